"""What is exported, and what to compare the result with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass

import torch
from torch import nn

from exporters.shared.outputs import output_names
from passes.ir.forward_context import Call, copied, state_kept
from passes.ir.torch_internals import tree_leaves
from surgery.errors import ExportError


@dataclass(frozen=True)
class Subject:
    """What is exported, and what to compare the result with.

    Attributes:
        root: takes the call, and returns plain containers; a live one has the buffer ``coeff``.
        reference: the model, operated on, that agrees with it.
        call: arguments; flags such as ``use_cache`` are bound to the root instead.
        fixed: these flags.
        coeffs: values of the coefficient to compare at; (None,) of a merged one.
    """

    root: nn.Module
    reference: nn.Module
    call: Call
    fixed: dict[str, object]
    coeffs: tuple[float | None, ...]

    @property
    def live(self) -> bool:
        """Whether the adapter stays in the program."""
        return None not in self.coeffs

    def expected(self, call: Call) -> list[torch.Tensor]:
        """Outputs of the reference."""
        args, kwargs = copied(call)
        with state_kept(self.reference), torch.no_grad():
            return leaves(self.reference(*args, **kwargs, **self.fixed))


def leaves(output: object) -> list[torch.Tensor]:
    """All tensors of an output in the order of the program's."""
    return [leaf for leaf in tree_leaves(plain(output)) if isinstance(leaf, torch.Tensor)]


def plain(output: object) -> object:
    """An output in containers that any process knows: a flat dict in place of a mapping or a record, else as it is.

    Raises:
        ExportError: it holds something else than tensors.
    """
    if isinstance(output, Mapping) or is_dataclass(output):
        values = output if isinstance(output, Mapping) else vars(output)
        values = dict(values)  # of a class that pytrees may not know
        named = zip(output_names(values), map(plain, tree_leaves(values)), strict=True)
        return {name: leaf for name, leaf in named if leaf is not None}
    if isinstance(output, list | tuple):
        return tuple(map(plain, output))
    if output is None or isinstance(output, torch.Tensor):
        return output
    raise ExportError(f"the model returns a {type(output).__name__}; an export holds tensors, and containers of them")
