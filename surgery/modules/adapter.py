"""The adapter of one site, ``y = x W^T + b + delta(x Vh^T) U^T``: variant, frozen factors, core, and what follows.

How an adapter meets a model is the business of its host (:mod:`surgery.hosting`): a module that is called, a weight
that is read, or a place in a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from passes.ir.torch_internals import is_exporting
from surgery.lowerings import ALWAYS, IN_RESIDUAL, REGISTRY, Schedule, step
from surgery.lowerings._cost_model import schedule_of
from surgery.lowerings._weight_cache import PREPARED, WEIGHT, WeightCache
from surgery.modules.base_weights import BaseWeight
from surgery.modules.coefficients import RowLayout, by_rows
from surgery.modules.core import Core, Factors
from surgery.modules.host import Host
from surgery.modules.inlined_adapter import InlinedAdapter
from surgery.modules.weight_change import CoreView
from surgery.variants import Variant

ROWS_FIRST = RowLayout(0, "entries")  # what a graph gives the adapters that are inlined in it


class Adapter(InlinedAdapter):
    """Everything that surgery puts at one site.

    Attributes:
        key: of the site, as it was when it was operated on.
        host: how the adapter meets the model.
        base_weight: the frozen base weight.
        variant: the variant's configuration.
        factors: the frozen factors ``.U``, ``.S``, ``.Vh``.
        core: the trainable core.
        form: "delta"; "residual" where ``W_res`` stands in the weight's place.
        lowering: "auto", "measure", or the name of the one lowering to use.
        schedule: which lowering runs from how many tokens on; of a called module.
        record: which base weight the factors belong to.
        stream: which of a model's sequences the site follows, 0 for the main one.
        row_layout: which entries of its input belong to which row; a sentence that says why that is not known; None
            before it was measured.
        coeff_is_folded: whether coeff is a constant of the graph.
    """

    row_layout: RowLayout | str | None

    def __init__(
        self, key: str, host: Host, base_weight: BaseWeight, variant: Variant, factors: Factors, core: Core
    ) -> None:
        super().__init__(key, host, base_weight, variant, factors, core)
        self.schedule: Schedule | None = None
        self.row_layout = None
        self.cache = WeightCache(self)

    # ------------------------------------------------------------------ forward of a called module

    def lower(self, x: torch.Tensor, base: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output of the site, (..., d_out) for x (..., d_in), in one of the lowerings.

        Args:
            base: computes what the module gives without the adapter.
        """
        return REGISTRY[self.chosen(x)].run(self, x, base)

    def chosen(self, x: torch.Tensor) -> str:
        """Name of the lowering for an input; what is traced or exported always shows the low-rank form.

        Tables are read directly: in each forward, an attribute of a module costs a microsecond.
        """
        if self.form == "residual":
            return IN_RESIDUAL
        core, steering = self._modules["core"], self._steering[0]
        assert isinstance(core, Core)
        if torch.compiler.is_compiling():
            if is_exporting() or torch.is_autocast_enabled(x.device.type):
                return ALWAYS
        elif not core.plain() or type(x) not in (torch.Tensor, nn.Parameter):
            return ALWAYS
        weight = self.host.owner._parameters.get("weight")
        if weight is None or weight.requires_grad or self.record.trained:  # the base has to be in the product
            return ALWAYS
        assert self.schedule is not None
        learns, coeff = core.learns(), steering._buffers["coeff"]
        recalled = None if torch.compiler.is_compiling() else steering.recall()
        if recalled is not None:
            coeff = recalled.now.coeff
        steps = self.schedule.case(training=learns, rows=coeff.dim() > 0)  # type: ignore[union-attr]
        name = step(steps, x.numel() // self.factors.Vh.shape[1]) if len(steps) > 1 else steps[0][1]
        lowering = REGISTRY[name]
        if not steering.armed and lowering.takes_projection:
            if torch.compiler.is_compiling():
                return name if learns else ALWAYS  # in training, a recomputation has to choose the same
            if recalled is None:  # a part is called by itself; a recomputation has to choose as its forward did
                self.record.settle(self, weight)
        return name if steering.armed or learns or not lowering.caches else ALWAYS

    def runs(self) -> bool:
        """Whether the model runs, in this thread: what reads the weight now multiplies by it."""
        steering = self._steering[0]
        if torch.compiler.is_compiling() or steering.recall() is not None:
            return True
        return steering.armed and steering.caller in (None, threading.get_ident())

    def reschedule(self, lowering: str | None = None) -> None:
        """Decide which lowering runs when, for the dtype and the device that the site has now.

        Args:
            lowering: another one than that of before.

        Raises:
            InputError: the named lowering does not exist, or does not fit the site.
        """
        self.schedule = schedule_of(self, lowering or self.lowering)
        self.lowering = lowering or self.lowering

    # ------------------------------------------------------------------ the term

    def _coefficient(self, device: torch.device) -> tuple[torch.Tensor, str, bool]:
        """The coefficient of the site, in the core's dtype: 0-d, (rows,), or (rows, positions); how rows relate to a
        batch, and whether they are those of a call of the root.
        """
        coeff, scale, rows, known = self.steered(device)
        core = self._modules["core"]
        assert isinstance(core, Core)
        if scale is not None:
            coeff = coeff * scale.to(coeff.dtype)
        return coeff.to(core.dtype), rows, known

    def _delta(self, h: torch.Tensor, S: torch.Tensor, coeff: torch.Tensor, rows: str, known: bool) -> torch.Tensor:
        """``delta(h)`` (..., r); where coeff has one value for each row or token, these lead while it is computed.

        Raises:
            InputError: the coefficient does not fit the input.
        """
        if coeff.dim() == 0:
            return self.variant.delta(h, S, self._prepared(), coeff)
        steering = self._steering[0]
        if steering.probe is not None:
            return steering.probe(self, h)
        layout = ROWS_FIRST if self.host.inlined else self.row_layout
        view = by_rows(coeff, h, layout, rows=rows, known=known, key=self.key)
        d = self.variant.delta(view.h, S, self._prepared(), view.coeff)
        return d if view.restore is None else view.restore(d)

    def core_delta(self, h: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
        """``delta(h)`` (..., r) at the present core and coeff."""
        coeff, rows, known = self._coefficient(h.device)
        if torch.is_grad_enabled():
            coeff = coeff.clone()  # DDP writes to it
            if not torch.compiler.is_compiling() and not self._steering[0].armed:
                self._steering[0].record_part(self.core)
        return self._delta(h, S.to(coeff.dtype), coeff, rows, known)

    def _prepared(self) -> Any:
        """The core, with what the variant prepares from it where no gradient is wanted; cached while armed."""
        core, variant = self.core, self.variant
        if not variant.prepares or torch.is_grad_enabled():
            return core
        if torch.compiler.is_compiling() or not core.plain():
            return core  # what traces must see the computation
        return self.cache.get(PREPARED, prepare)

    def adapter_delta(self, x: torch.Tensor) -> torch.Tensor:
        """``delta(x Vh^T)`` (..., r) in the dtype of x."""
        return self.core_delta(F.linear(x, self.factors.Vh.to(x.dtype)), self.factors.S)

    def adapter_term(self, x: torch.Tensor, *, whole: bool = False) -> torch.Tensor:
        """``delta(x Vh^T) U^T``, (..., d_out), by two low-rank products in the dtype of x.

        Args:
            whole: add the base's own part in the factors' span, ``(S h + delta) U^T``, as the residual form wants it.
        """
        h = F.linear(x, self.factors.Vh.to(x.dtype))
        coeff, rows, known = self._coefficient(h.device)
        S = self.factors.S.to(coeff.dtype)
        d = self._delta(h, S, coeff, rows, known)
        if whole:
            d = h * S.to(h.dtype) + d
        return F.linear(d, self.factors.U.to(x.dtype))

    # ------------------------------------------------------------------ as part of a graph, or of a weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the product of x, (..., d_out); of a weight that is read, the changed weight."""
        if not self.host.changes_weight:
            return self.adapter_term(x, whole=self.form == "residual")
        return self.cache.get_for(WEIGHT, x, self._with_change) if self.reuses(x) else self._with_change(x)

    def _with_change(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight with the change of the site, which may be some of its rows."""
        if self.rows is None or self.host.inlined:
            return self.changed_weight(weight)
        start, stop = self.rows
        return torch.cat([weight[:start], self.changed_weight(weight[start:stop]), weight[stop:]])

    def reuses(self, weight: torch.Tensor) -> bool:
        """Whether the changed weight may be that of an earlier read: the root has checked it, and nothing traces."""
        core, steering = self._modules["core"], self._steering[0]
        assert isinstance(core, Core)
        if torch.compiler.is_compiling() or self.host.inlined or not steering.armed or not core.plain():
            return False
        if core.trains() or (weight.requires_grad and torch.is_grad_enabled()):
            return False
        return not weight.is_meta and type(weight) in (torch.Tensor, nn.Parameter) and steering.coeff.dim() == 0

    def reference(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the site should give for an input and its product, by the forward that the in-place host runs."""
        return self.changed_weight(x) if self.host.changes_weight else y + self.adapter_term(x)

    # ------------------------------------------------------------------ as a module

    def forget(self) -> None:
        """Drop what is derived from the core."""
        self.cache.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.record.converting(self, self.host.registered())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.forget()
        return self

    def converted(self) -> None:
        """Decide anew which lowering runs when, after the module of the site was converted too."""
        if self.form != "residual":  # whose weight is converted later
            self.record.converted(self, self.host.registered())
        if self.schedule is not None and self.lowering == "auto" and not self.factors.U.is_meta:
            self.reschedule()

    def train(self, mode: bool = True) -> Self:
        """Change the mode, and drop what is cached."""
        self.forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"record": self.record.for_copy()}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cache = WeightCache(self)
        self.record.copied(self)

    def extra_repr(self) -> str:
        stack = f"stack={self.factors.stack}, " if self.factors.stack else ""
        scale = "" if self.core.scale is None else f", scale={float(self.core.scale):g}"
        d_in, d_out = self.features
        sizes = f"{stack}d_out={d_out}, d_in={d_in}, r={self.factors.rank}"
        return f"{self.variant.name}, {sizes}, host={self.host.name}{scale}"


def prepare(site: Adapter) -> CoreView:
    """The tensors of a site's core and what its variant prepares from them."""
    with torch.no_grad():
        return CoreView(site.core.tensors() | site.variant.prepare(site.core))  # type: ignore[arg-type]
