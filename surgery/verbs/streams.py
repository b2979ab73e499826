"""Which of a model's two sequences each site follows, measured at unlike lengths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import nn

from passes.capture.capture import default_inputs, forward_call
from passes.errors import InputError
from passes.ir.forward_context import copied, inference_mode_of, state_kept
from surgery.hosting.coefficient import DECODER
from surgery.modules.adapter import Adapter

LENGTHS = (5, 7)  # of the encoder's and of the decoder's sequence


def follow_sequences(model: nn.Module, found: Mapping[str, Adapter], *, two: bool) -> None:
    """Note at each site which sequence its input follows.

    Args:
        two: whether a coefficient is given for each of two sequences.

    Raises:
        InputError: the model has two sequences and a coefficient for one, or the other way round; or a site's input
            follows neither.
    """
    names = inspect.signature(model.forward).parameters
    has_two = DECODER[0] in names
    if has_two and not two:
        raise InputError(
            f"{type(model).__name__} has two sequences: give tokens={{'input_ids': …, 'decoder_input_ids': …}}"
        )
    if not has_two:
        if two:
            raise InputError(f"{type(model).__name__} has one sequence: give coeff as a tensor (batch, columns)")
        return
    lengths = _lengths(model, found)
    for key, site in found.items():
        length = lengths.get(key)
        if length is None:
            continue  # it is not reached, so that it may follow either
        if length not in LENGTHS:
            raise InputError(
                f"site {key!r}: with sequences of {LENGTHS[0]} and {LENGTHS[1]} its input has {length} positions; "
                "leave it out with exclude_modules"
            )
        site.stream = 1 if length == LENGTHS[0] else 0


def _lengths(model: nn.Module, found: Mapping[str, Adapter]) -> dict[str, int]:
    """Number of positions at each called site, for sequences of unlike lengths."""
    args, kwargs = forward_call(_inputs(model))
    lengths: dict[str, int] = {}
    with state_kept(model), inference_mode_of(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for key, site in found.items():

            def see(
                _: nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor], key: str = key
            ) -> None:
                x = given[0] if given else next(iter(named.values()))
                lengths[key] = x.shape[1] if x.dim() > 2 else x.shape[0] // 2

            site.host.owner.register_forward_pre_hook(see, with_kwargs=True)  # gone after the block
        type(model).forward(model, *copied((args, kwargs))[0], **copied((args, kwargs))[1])
    return lengths


def _inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Example inputs of two rows whose sequences have unlike lengths."""
    inputs = default_inputs(model)
    if not isinstance(inputs, dict):
        raise InputError(f"{type(model).__name__} has no default inputs to measure its sequences with")
    found = {}
    for name, tensor in inputs.items():
        length = LENGTHS[1] if name.startswith("decoder") else LENGTHS[0]
        columns = torch.arange(length) % tensor.shape[1]
        found[name] = tensor[:, columns] if tensor.dim() == 2 else tensor
    if DECODER[0] not in found:
        found[DECODER[0]] = next(iter(found.values()))[:, torch.arange(LENGTHS[1]) % LENGTHS[0]]
    return found
