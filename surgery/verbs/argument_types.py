"""Named types of the arguments that several verbs take.

Where a name is looked up in a registry, any string is a valid type, since a new file may add to it. The literals beside
it are the names of this package: an editor completes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import torch
from torch.export import ExportedProgram

from passes.ir.forward_context import ExampleInputs
from surgery.bases import Basis
from surgery.planning.calibration_run import Calibration
from surgery.planning.target_selection import Patterns
from surgery.variants import Variant

__all__ = [
    "Calibration",
    "ExampleInputs",
    "Form",
    "LoweringName",
    "Program",
    "Stage",
    "SurgeryOptions",
    "VariantLike",
    "VariantName",
    "Verify",
]

Verify = ExampleInputs | bool | None
"""Example inputs to compare on, True for those that a graph was captured with; False or None for no comparison."""

Program = ExportedProgram | torch.jit.ScriptModule
"""What has no graph that can be rewritten, so that surgery gives a new ``GraphModule``."""

Form = Literal["delta", "residual"]
Stage = Literal["insert", "fold", "fuse", "merge"]
LoweringName = Literal["auto", "measure", "lowrank", "output", "pair", "dense", "residual"] | str
VariantName = (
    Literal[
        "antipasto",
        "antipasto_ablate",
        "antipasto_arrow",
        "antipasto_asvd",
        "antipasto_corda",
        "antipasto_dplr",
        "antipasto_rot",
        "lora_xs",
        "sspace",
        "sspace_scale",
    ]
    | str
)
VariantLike = VariantName | Variant


class SurgeryOptions(TypedDict, total=False):
    """The keyword arguments of ``apply_surgery``, for its overloads."""

    r: int | None
    target_modules: Patterns | None
    exclude_modules: Patterns | None
    layers_to_transform: int | Sequence[int] | None
    rank_pattern: Mapping[str, int] | None
    example_inputs: ExampleInputs | None
    calibration: Calibration | None
    form: Form
    lowering: LoweringName
    keep_base: bool
    basis: str | Basis | None
    seed: int
    progress: bool | None
