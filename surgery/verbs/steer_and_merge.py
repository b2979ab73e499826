"""The verbs on an operated model: steer it, merge it, look at it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn

from passes.errors import InputError, SurgeryError, VariantError, WeightError
from passes.ir.forward_context import outside_inference_mode
from passes.transforms.merge import Merge, other_readers
from surgery.hosting.checks import check_flags, check_whole
from surgery.hosting.graph_surgery import copy_as_ever, drop_sites, rewrite
from surgery.hosting.hosts import host_of, operated_sites, replace_weight, weights_of
from surgery.hosting.steering_guard import check_steering, steering
from surgery.hosting.transaction import transaction
from surgery.modules.adapter import SSpaceLinear
from surgery.modules.graph_host_module import SSpaceNode
from surgery.modules.merged_weight import merged_weight
from surgery.storage.adapter_reader import module_paths, parameter_names
from surgery.support.progress_bar import track
from surgery.verbs.apply import Model, record_of, restore_flags, unwrap
from surgery.verbs.argument_types import Verify
from surgery.verbs.verification import graph_validation

Coefficient = float | torch.Tensor


def sites(model: nn.Module) -> dict[str, SSpaceLinear]:
    """The operated sites of a model by key; empty for a plain model."""
    return operated_sites(unwrap(model))


def set_coeff(model: Model, coeff: Coefficient) -> Model:
    """Set the steering coefficient of every site; values never recompile a compiled model.

    Args:
        coeff: a finite number, or a tensor (batch,) that steers every row of a batch differently.

    Raises:
        InputError: coeff is not finite, has more than one dimension, or is per row where a site is hosted as a weight.
        SurgeryError: the model carries no surgery, or another thread steers it.
    """
    found = _operated(model)
    check_steering(found)
    value = _coefficient(coeff)
    if fixed := [key for key, site in found.items() if getattr(site, "coeff_is_folded", False)]:
        raise InputError(f"site {fixed[0]!r}: coeff was folded into a constant, so it cannot be set any more")
    weights = [key for key, site in found.items() if host_of(site) == "weight"]
    if value.dim() and weights:
        raise InputError(
            f"site {weights[0]!r} is read as a weight, which cannot differ between the rows of a batch; "
            "use a scalar coeff, or leave such sites out with exclude_modules"
        )
    _write_all({key: (site, value) for key, site in found.items()})
    return model


def _coefficient(coeff: Coefficient) -> torch.Tensor:
    try:
        # a Python number must not be rounded to float32 on its way to a float64 core
        value = coeff.detach() if isinstance(coeff, torch.Tensor) else torch.as_tensor(coeff, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"coeff must be a number or a tensor (batch,), found {coeff!r:.80}") from error
    if value.dim() > 1 or value.numel() == 0 or value.is_complex() or value.is_meta:
        raise InputError(f"coeff must be a real number or a tensor (batch,), found {coeff!r:.80}")
    if not torch.isfinite(value.float()).all():
        raise InputError(f"coeff must be finite in float32, found {value.tolist()}")
    return value.to(torch.float64)


def _write(site: SSpaceLinear, value: torch.Tensor) -> None:
    """Write coeff in place where the shape allows, which no compiled code notices."""
    old = site.core.coeff
    with torch.inference_mode(False), torch.no_grad():
        if old.shape == value.shape:
            old.copy_(value)
        else:
            site.core.coeff = value.to(dtype=old.dtype, device=old.device, copy=True)


def _write_all(values: dict[str, tuple[SSpaceLinear, torch.Tensor]]) -> None:
    """Write the coeff of every site, or of none."""
    before = [(site, site.core.coeff, site.core.coeff.clone()) for site, _ in values.values()]
    try:
        for site, value in values.values():
            _write(site, value)
    except BaseException:
        for site, tensor, value in before:
            site.core.coeff = tensor
            _write(site, value)
        raise


@contextlib.contextmanager
def steer(model: Model, coeff: Coefficient) -> Iterator[Model]:
    """Set the coefficient within a ``with`` block, and put back what each site had.

    Raises:
        SurgeryError: another thread or task is within such a block; blocks of one may be nested.
    """
    found = _operated(model)
    with steering(found):
        before = {key: site.core.coeff.clone() for key, site in found.items()}
        try:
            yield set_coeff(model, coeff)
        finally:
            try:
                _put_back(model, before)
            except BaseException:  # an interrupt; what was begun is to be ended all the same
                _put_back(model, before)
                raise


def _put_back(model: nn.Module, coeffs: dict[str, torch.Tensor]) -> None:
    """Write the coeffs that sites had; some may have gone."""
    found = sites(model)
    _write_all({key: (found[key], coeff) for key, coeff in coeffs.items() if key in found})


@outside_inference_mode
def merge(model: Model, *, untie: bool = False, progress: bool = False, verify: Verify = False) -> Model:
    """Turn every site into a plain dense module that holds ``W + dW`` at the present coeff.

    The sum is formed in float64 and rounded once to the weight's dtype; no base tensor is written. The model is then a
    plain one: ``requires_grad`` is what it was before surgery, and there is nothing left to undo.

    Args:
        untie: give a site whose weight is shared with another module a weight of its own.
        progress: show a progress bar.
        verify: compare an operated graph before and after on these inputs; True takes those that it was captured with.

    Raises:
        VariantError: a variant is not linear, so that no weight has the same effect.
        WeightError: a weight is tied and ``untie`` is false.
        InputError: coeff steers rows, the merged weight is not finite in its dtype, or verify is asked of what is no
            graph.
    """
    check_flags(untie=untie, progress=progress)
    given, model = model, unwrap(model)
    record, found = record_of(model), _operated(model)
    nodes = {key: site for key, site in found.items() if isinstance(site, SSpaceNode)}
    shared = _shared(model, found)
    for key, site in found.items():
        if not site.variant.linear:
            raise VariantError(f"site {key!r}: {site.variant.name} is not linear in its input, so it cannot be merged")
        check_whole(key, site.parameter)
        if key in shared and not untie:
            raise WeightError(
                f"site {key!r} shares its weight with {', '.join(shared[key])}: merging "
                "would change these too; untie=True gives the site a weight of its own"
            )
    paths = module_paths(model)
    bases = [(parameter_names(paths, site)[0], site.parameter) for site in found.values()]
    if verify is not False and verify is not None and not nodes:
        raise InputError("verify= compares a graph before and after; this model is no graph: use to_graph first")
    validation = graph_validation(model, verify)
    with transaction(model, forwards=False):
        items = track(list(found.items()), "merging", enabled=progress)
        merged = {key: merged_weight(site, key) for key, site in items}
        if nodes:
            rewrite(model, [Merge({key: merged[key] for key in nodes}, untie=untie)], validation=validation)
            drop_sites(model, nodes)
        for key, site in found.items():
            if key not in nodes:
                replace_weight(site, merged[key])
        if isinstance(model, fx.GraphModule):
            copy_as_ever(model)
        if untie and shared and not nodes:
            _forget_ties(model)
        restore_flags(model, record.requires_grad, bases)
        del vars(model)["_surgery"]
    return given


def refresh(model: Model) -> Model:
    """Drop what is kept of the cores and the weights made with them, so that the next forward makes them anew.

    Only needed after a write to ``.data`` on an accelerator, where ``eval()`` does it too, or to the ``.data`` of a
    frozen tensor.

    Raises:
        SurgeryError: the model carries no surgery.
    """
    for site in _operated(model).values():
        site.forget()
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, a shared one counted once."""
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    found = {id(p): p for module in model.modules() for p in weights_of(module) if p is not None}
    sizes = [(p.numel(), p.requires_grad) for p in found.values()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line on trainable and all parameters."""
    trainable, total = trainable_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def _operated(model: nn.Module) -> dict[str, SSpaceLinear]:
    found = sites(model)
    if not found:
        raise SurgeryError(
            f"{type(unwrap(model)).__name__} carries no surgery: call apply_surgery or load_adapter first"
        )
    return found


def _shared(model: nn.Module, found: dict[str, SSpaceLinear]) -> dict[str, list[str]]:
    """What else has or reads the weight of a site, by the site's key."""
    owners, shared = _owners(model), {}
    for key, site in found.items():
        if isinstance(site, SSpaceNode):
            continue
        others = owners.get(id(site.parameter), set())
        if len(others) > 1:
            shared[key] = sorted(others - {key})
    if isinstance(model, fx.GraphModule):
        shared |= {key: [f"node {node.name!r}" for node in nodes] for key, nodes in other_readers(model).items()}
    return {key: names for key, names in shared.items() if names}


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Paths of the modules that register each parameter, by the parameter's identity."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for parameter in weights_of(module):
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(path.partition(".parametrizations.")[0])
    return owners


def _forget_ties(model: nn.Module) -> None:
    """Tell a ``transformers`` model that its head has a weight of its own, or saving would drop it."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
