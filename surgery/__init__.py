"""S-space model surgery: adapters in the singular basis of a model's own weights.

import surgery
surgery.apply_surgery(model, "antipasto", r=64)     # then train the cores, steer with set_coeff, save, merge
"""

from passes.errors import CaptureError, InputError, PassError, SurgeryError
from surgery.errors import AdapterError, ExportError, RankError, TargetError, VariantError, WeightError
from surgery.factors.statistics_file import Statistics
from surgery.modules.adapter import SSpaceLinear
from surgery.planning.calibration_run import Contrast
from surgery.storage.hub import pull_adapter, push_adapter
from surgery.variants import REGISTRY, Variant
from surgery.verbs.apply import apply_surgery, inspect_sites, undo_surgery
from surgery.verbs.calibrate import calibrate, recalibrate
from surgery.verbs.graph import Compiled, fold, fuse, pipeline, to_graph
from surgery.verbs.report import Report, report
from surgery.verbs.save_load import load_adapter, save_adapter
from surgery.verbs.steer_and_merge import merge, print_trainable_parameters, refresh, set_coeff, sites, steer

# Every variant's configuration is public under its own name, without a list of them here.
globals().update({cls.__name__: cls for cls in REGISTRY.values()})

__all__ = [
    "AdapterError",
    "CaptureError",
    "Compiled",
    "Contrast",
    "ExportError",
    "InputError",
    "PassError",
    "RankError",
    "Report",
    "SSpaceLinear",
    "Statistics",
    "SurgeryError",
    "TargetError",
    "Variant",
    "VariantError",
    "WeightError",
    "apply_surgery",
    "calibrate",
    "fold",
    "fuse",
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
    "sites",
    "steer",
    "to_graph",
    "undo_surgery",
]
__all__ += [cls.__name__ for cls in REGISTRY.values()]
