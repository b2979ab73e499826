"""``merge``: plain dense modules again; and what concerns the parameters of an operated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import fx, nn

from passes.errors import InputError
from passes.ir.forward_context import outside_inference_mode
from passes.transforms.merge_adapters import Merge, other_readers
from surgery.errors import VariantError, WeightError
from surgery.hosting.checks import check_flags, check_whole
from surgery.hosting.graph_surgery import copy_as_ever, drop_sites, rewrite
from surgery.hosting.root import roots_of, unmake_root
from surgery.hosting.state import (
    adapters_in,
    adapters_of,
    check_weights,
    module_paths,
    own_tensors,
    parameter_names,
    record_of,
    restore_flags,
    trainable_parameters,
)
from surgery.hosting.transaction import transaction
from surgery.modules.adapter import Adapter
from surgery.modules.merged_weight import merged_weight
from surgery.support.progress_bar import track, wanted_on
from surgery.verbs.argument_types import Verify
from surgery.verbs.verification import graph_validation

Model = TypeVar("Model", bound=nn.Module)


@outside_inference_mode
def merge(model: Model, *, untie: bool = False, progress: bool | None = None, verify: Verify = False) -> Model:
    """Turn every site into a plain dense module that holds ``W + dW`` at the present coeff.

    The sum is formed in float64 and rounded once to the weight's dtype; no base tensor is written. The model is then a
    plain one: ``requires_grad`` is what it was before surgery, and there is nothing left to undo.

    Args:
        untie: give a site whose weight is shared with another module a weight of its own.
        progress: show a progress bar; None: on a terminal.
        verify: compare an operated graph before and after on these inputs; True takes those that it was captured with.

    Raises:
        VariantError: a variant is not linear, so that no weight has the same effect.
        SurgeryError: a base weight is another one than the factors were made for.
        WeightError: a weight is tied and ``untie`` is false; or it is of a kind that takes no change.
        InputError: coeff steers rows, the merged weight is not finite in its dtype, or verify is asked of what is no
            graph.
    """
    check_flags(untie=untie)
    bars = wanted_on(progress)
    for root in roots_of(model):
        _merge(root, untie=untie, progress=bars, verify=verify)
    return model


def _merge(model: nn.Module, *, untie: bool, progress: bool, verify: Verify) -> None:
    state, paths = record_of(model), module_paths(model)
    found = adapters_in(paths)
    check_weights(found)
    nodes = {key: site for key, site in found.items() if site.host.inlined}
    shared = _shared(model, paths, found)
    for key, site in found.items():
        if not site.variant.linear:
            raise VariantError(f"site {key!r}: {site.variant.name} is not linear in its input, so it cannot be merged")
        check_whole(key, site.base_weight)
        if key in shared and not untie:
            raise WeightError(
                f"site {key!r} shares its weight with {', '.join(shared[key])}: merging "
                "would change these too; untie=True gives the site a weight of its own"
            )
    bases = [(parameter_names(paths, site)[0], _base(site)) for site in found.values()]
    if verify is not False and verify is not None and not nodes:
        raise InputError("verify= compares a graph before and after; this model is no graph: use to_graph first")
    validation = graph_validation(model, verify)
    with transaction(model, forwards=False):
        items = track(list(found.items()), "merging", enabled=progress)
        merged = {key: merged_weight(site, key) for key, site in items}
        if nodes:
            assert isinstance(model, fx.GraphModule)
            rewrite(model, [Merge({key: merged[key] for key in nodes}, untie=untie)], validation=validation)
            drop_sites(model, nodes)
        for key, site in found.items():
            if key not in nodes:
                site.host.put_weight(merged[key])
        if isinstance(model, fx.GraphModule):
            copy_as_ever(model)
        if untie and shared and not nodes:
            _forget_ties(model)
        restore_flags(model, state.requires_grad, bases)
        unmake_root(model)


def refresh(model: Model) -> Model:
    """Drop what is derived from the cores and the frozen tensors, so that the next forward recomputes it.

    Only needed after a write that bumps no version counter: to ``.data``, or through NumPy. Optimisers need none. The
    next call compares all base weights with those that the factors were made for, by their hashes.

    Raises:
        SurgeryError: the model carries no surgery.
    """
    for root in roots_of(model):
        record_of(root).staleness.forget()
        for site in adapters_of(root).values():
            site.forget()
            site.record.forget(site.host.registered())
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line on trainable and all parameters."""
    trainable, total = trainable_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def _base(site: Adapter) -> torch.Tensor:
    """The base parameter itself, where a remainder stands in for it too."""
    return site.host.parameter() if site.host.set_aside is None else site.host.set_aside


def _shared(model: nn.Module, paths: Mapping[nn.Module, str], found: dict[str, Adapter]) -> dict[str, list[str]]:
    """What else has or reads the weight of a site, by the site's key."""
    owners, shared = _owners(paths), {}
    for key, site in found.items():
        if site.host.inlined:
            continue
        others = owners.get(id(_base(site)), set())
        if len(others) > 1:
            shared[key] = sorted(others - {key})
    if isinstance(model, fx.GraphModule):
        shared |= {key: [f"node {node.name!r}" for node in nodes] for key, nodes in other_readers(model).items()}
    return {key: names for key, names in shared.items() if names}


def _owners(paths: Mapping[nn.Module, str]) -> dict[int, set[str]]:
    """Paths of the modules that register each parameter, by the parameter's identity."""
    owners: dict[int, set[str]] = {}
    for module, path in paths.items():
        for parameter in own_tensors(module):
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(path.partition(".parametrizations.")[0])
    return owners


def _forget_ties(model: nn.Module) -> None:
    """Tell a ``transformers`` model that its head has a weight of its own, or saving would drop it."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
