"""The site of a graph patient: the tensors of an adapter that is inlined in the graph."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import nn

from passes.analysis.linear_sites import part_of
from passes.ir.adapter_trace import INPUT
from passes.ir.module_utils import attribute, private_module
from surgery.modules.adapter import SSpaceLinear, changed_weight, rebuilt, remainder
from surgery.modules.core import Core, Factors
from surgery.modules.merged_weight import merged_weight
from surgery.variants import Variant


class SSpaceNode(SSpaceLinear):
    """A site whose adapter is inlined in a graph: it holds the tensors, and its forward is what was traced.

    Attributes:
        key: of the site.
        owner: the graph module, in a tuple.
        weight_name, bias_name: of the base parameters in the graph module.
        kind: "product" (its term is added to the product) or "weight" (it changes the weight that the graph reads).
        form: "delta" or "residual".
        in_place_host: how a model that is operated on in place would host the site.
        rows: of a part of a packed weight, whose reads in the graph are split.
    """

    def __init__(
        self,
        owner: nn.Module,
        key: str,
        names: tuple[str, str | None],
        variant: Variant,
        factors: Factors,
        core: Core,
        layout: str,
        *,
        kind: str = "product",
        in_place_host: str | None = None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.owner = (owner,)
        self.key, self.kind, self.form, self.in_place_host = key, kind, "delta", in_place_host
        self.weight_name, self.bias_name = names
        self.variant, self.factors, self.core, self.layout = variant, factors, core, layout
        self.base_class = nn.Module
        self.weight_dtype = self.owner[0].get_parameter(self.weight_name).dtype
        self.base_error: float | None = None
        self.coeff_is_folded = False
        self.keeps_base = True
        self.base_fingerprint: str | None = None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The frozen base weight; where it was not kept, what the factors and the remainder give."""
        found = attribute(self.owner[0], self.weight_name)
        return self.rebuilt_weight() if found is None else part_of(found, self.rows)

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter that holds the weight; of a part of a packed weight, the whole."""
        return self.weight if self.rows is None else attribute(self.owner[0], self.weight_name)  # type: ignore[no-any-return]

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the weight; of a part without slicing it, which a trace would see."""
        return self.weight.shape if self.rows is None else torch.Size(self.factors.shape)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The frozen bias that is added to the product, or None."""
        return part_of(self.owner[0].get_parameter(self.bias_name), self.rows) if self.bias_name else None

    @property
    def base(self) -> str | None:
        """Name of the tensor that the graph multiplies by in place of the weight."""
        return "W_res" if self.form == "residual" else None

    @property
    def knob(self) -> str:
        """Name of the tensor that steers."""
        return "core.coeff"

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.factors.U.device

    @property
    def features(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return self.factors.shape[-1], self.factors.shape[-2]

    @property
    def signature(self) -> Hashable:
        """Sites of equal signature have the same forward but for d_in and d_out."""
        tensors = [*self.core.named_parameters(), *self.core.named_buffers(), *self.factors.named_buffers()]
        dtypes = tuple((name, tensor.dtype) for name, tensor in tensors)
        fixed = None if self._has_free_sizes else (self.factors.shape, tuple(self.weight.shape))
        return type(self), self.variant, self.factors.rank, self.layout, self.kind, self.form, dtypes, fixed

    @property
    def batched(self) -> bool:
        """Whether the forward runs under ``vmap``."""
        return self.factors.stack is not None

    @property
    def _has_free_sizes(self) -> bool:
        """Whether the weight is its own matrix; any other is reshaped, by numbers."""
        return len(self.factors.shape) == len(self.weight.shape) == 2

    @property
    def free_sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Dimensions that the signature leaves open."""
        if not self._has_free_sizes:
            return {INPUT: ()}
        return {"factors.U": (0,), "factors.Vh": (1,), "W_res": (0, 1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """What the graph adds to the product of x, (rows, tokens, d_in); or the changed weight, of the weight."""
        if self.kind == "weight":
            return changed_weight(self, x)
        return self.adapter_term(x, whole=self.form == "residual")

    def reference(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the site should give for an input and its product, by the forward that the in-place host runs."""
        return changed_weight(self, x) if self.kind == "weight" else y + self.adapter_term(x)

    def merged_weight(self) -> torch.Tensor:
        """The dense weight ``W + dW``."""
        return merged_weight(self, self.key)

    def split(self) -> None:
        """Hold the remainder ``W_res = W - U S Vh`` of the stored factors, in float32 or better; residual form."""
        self.register_buffer("W_res", remainder(self))
        self.form = "residual"
        W = self.weight.detach().to(torch.float64)
        self.base_error = float((self.rebuilt_weight().to(torch.float64) - W).abs().max() / W.abs().max().clamp(1e-300))

    def use_base(self) -> None:
        """Go over to delta form; a weight that was not kept is registered again, rounded once from float64."""
        if attribute(self.owner[0], self.weight_name) is None:
            path, _, local = self.weight_name.rpartition(".")
            weight = nn.Parameter(self.rebuilt_weight(), requires_grad=False)
            private_module(self.owner[0], path)._parameters[local] = weight
        self.form = "delta"

    def rebuilt_weight(self) -> torch.Tensor:
        """``W_res + U S Vh`` in the weight's layout and dtype, summed in float64 and rounded once."""
        return rebuilt(self.get_buffer("W_res"), self, self.weight_dtype)
