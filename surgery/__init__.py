"""S-space model surgery: adapters in the singular basis of a model's own weights.

import surgery
surgery.apply_surgery(model, "antipasto", r=64)     # then train the cores, steer with set_coeff, save, merge
"""

from typing import TYPE_CHECKING

from passes.errors import CaptureError, InputError, PassError, SurgeryError
from surgery.errors import AdapterError, ExportError, RankError, TargetError, VariantError, WeightError
from surgery.factors.statistics_file import Statistics
from surgery.modules.adapter import Adapter
from surgery.planning.calibration_run import Contrast
from surgery.storage.hub import pull_adapter, push_adapter
from surgery.variants import REGISTRY, Variant
from surgery.variants.antipasto import AntiPaSTO
from surgery.variants.antipasto_ablate import AntiPaSTOAblate
from surgery.variants.antipasto_arrow import AntiPaSTOArrow
from surgery.variants.antipasto_asvd import AntiPaSTOASVD
from surgery.variants.antipasto_corda import AntiPaSTOCorDA
from surgery.variants.antipasto_dplr import AntiPaSTODPLR
from surgery.variants.antipasto_rot import AntiPaSTORot
from surgery.variants.lora_xs import LoRAXS
from surgery.variants.sspace import SSpace
from surgery.variants.sspace_scale import SSpaceScale
from surgery.verbs.apply import apply_surgery, inspect_sites, undo_surgery
from surgery.verbs.argument_types import Calibration, ExampleInputs, Form, LoweringName, VariantName
from surgery.verbs.calibrate import calibrate, recalibrate
from surgery.verbs.graph import Compiled, fold, fuse, pipeline, to_graph
from surgery.verbs.merge import merge, print_trainable_parameters, refresh
from surgery.verbs.report import Report, report
from surgery.verbs.save_load import load_adapter, save_adapter
from surgery.verbs.save_pretrained import SavesAdapter as _SavesAdapter  # noqa: F401 - found by roots
from surgery.verbs.set_lowering import set_lowering
from surgery.verbs.steer import disable_adapter, get_coeff, get_scale, set_coeff, set_scale, sites, steer

__all__ = [
    "Adapter",
    "AdapterError",
    "AntiPaSTO",
    "AntiPaSTOASVD",
    "AntiPaSTOAblate",
    "AntiPaSTOArrow",
    "AntiPaSTOCorDA",
    "AntiPaSTODPLR",
    "AntiPaSTORot",
    "Calibration",
    "CaptureError",
    "Compiled",
    "Contrast",
    "ExampleInputs",
    "ExportError",
    "Form",
    "InputError",
    "LoRAXS",
    "LoweringName",
    "PassError",
    "RankError",
    "Report",
    "SSpace",
    "SSpaceScale",
    "Statistics",
    "SurgeryError",
    "TargetError",
    "Variant",
    "VariantError",
    "VariantName",
    "WeightError",
    "apply_surgery",
    "calibrate",
    "disable_adapter",
    "fold",
    "fuse",
    "get_coeff",
    "get_scale",
    "inspect_sites",
    "load_adapter",
    "merge",
    "pipeline",
    "print_trainable_parameters",
    "pull_adapter",
    "push_adapter",
    "recalibrate",
    "refresh",
    "report",
    "save_adapter",
    "set_coeff",
    "set_lowering",
    "set_scale",
    "sites",
    "steer",
    "to_graph",
    "undo_surgery",
]

# A variant that is not in this package, or has just been added to it, is public under its class's name, too. Type
# checkers do not see this function: with it they would take any name for granted.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Variant]:
        for cls in REGISTRY.values():
            if cls.__name__ == name:
                return cls
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
