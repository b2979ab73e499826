"""Choose how an adapter meets the model at a site, by evidence: a changed class that nobody calls would be dead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from passes.analysis.linear_sites import Site
from passes.capture.module_calls import CallRecord
from passes.infra.tolerance import disagreement
from passes.ir.forward_context import state_kept
from passes.ir.linear_modules import layout_of_forward
from passes.ir.torch_internals import Convolution, convolves_as_ever
from surgery.hosting.called_module import ATTRIBUTE, Called
from surgery.hosting.subclasses import has_mixin, subclass_of
from surgery.modules.base_weights import BaseWeight, Held, kind_of

PROBE_ROWS = 4


def choose_host(model: nn.Module, site: Site, calls: CallRecord | None) -> str:
    """Host a site as a module only where the module is known to be called, and its weight never read without the call.

    Without a record of calls, children of PyTorch's own composite modules are taken to be read (as
    ``nn.MultiheadAttention`` does), and any other linear module to be called.
    """
    owner_path, _, local = site.weight.rpartition(".")
    owner = model.get_submodule(owner_path)
    if local != "weight" or owner is model or (calls is not None and site.weight in calls.read):
        return "weight"
    if why_not_called(owner, site.layout) is not None:
        return "weight"
    if calls is not None and site.key in calls.called:
        return "module"
    parent = model.get_submodule(owner_path.rpartition(".")[0])
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    composite = type(parent).__module__.startswith("torch.nn.") and not isinstance(parent, containers)
    return "weight" if composite else "module"


def why_not_called(owner: nn.Module, layout: str) -> str | None:
    """Why a module cannot be hosted by its class, or None."""
    if has_mixin(owner, Called):
        return None  # it is hosted so already
    if "forward" in vars(owner):
        return "a forward stands on the instance"
    if parametrize.is_parametrized(owner):
        return "it is parametrised"
    if hasattr(owner, ATTRIBUTE):
        return f"it has an attribute {ATTRIBUTE!r}"
    if isinstance(owner, Convolution):
        if not convolves_as_ever(owner):
            return "it convolves in a way of its own"
        if owner.groups != 1:
            return f"its {owner.groups} groups have a core each"
    try:
        subclass_of(type(owner), Called)
    except TypeError as error:
        return f"its class cannot be subclassed: {error}"
    if isinstance(owner, Convolution) or layout_of_forward(type(owner).forward) == layout:
        return None
    return _differs(owner, layout)


def is_product(module: nn.Module) -> bool:
    """Whether a module with a forward of its own is a site although no parameter is its matrix: it passes the probe."""
    if parametrize.is_parametrized(module):  # to read its weight is to run what computes it, which may write
        return False
    base = _base_weight(module, "out_in")
    if base is None or base.holds_entries or base.why_not_there():
        return False
    return why_not_called(module, "out_in") is None


def _base_weight(owner: nn.Module, layout: str) -> BaseWeight | None:
    """The base weight of a module, or None where it is of no kind."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, torch.Tensor) or nn.parameter.is_lazy(weight) or weight.dim() < 2:
        return None
    sizes = tuple(weight.shape) if layout == "out_in" else tuple(weight.shape)[::-1]
    if isinstance(owner, nn.Linear) and layout == "out_in":  # a packed weight may have another shape
        sizes = (owner.out_features, owner.in_features)
    kind = kind_of(weight, layout, sizes, None)
    return None if kind is None else kind(Held(weight), layout, sizes)


def _differs(owner: nn.Module, layout: str) -> str | None:
    """Whether the forward of a module is another function than the product with its weight, on a probe of 4 rows."""
    bias, base = getattr(owner, "bias", None), _base_weight(owner, layout)
    if base is None:
        return "its weight is no matrix"
    try:
        with state_kept(owner), torch.no_grad():
            matrix = base.matrix()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(PROBE_ROWS, matrix.shape[1], generator=generator).to(base.device, base.dtype)
            y = owner(x.clone())
            expected = F.linear(x, matrix, bias)
    except Exception as error:  # a forward of the user's may fail in any way
        return f"its forward fails on a probe: {type(error).__name__}"
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
        return "its forward gives no product"
    return "its forward is another function than F.linear" if disagreement(y, expected) else None
