"""Causal language models with their key/value cache: one graph for prefill and decoding, and greedy generation with it.

Inputs are ``input_ids`` (batch, sequence), ``attention_mask`` (batch, past_sequence + sequence), ``position_ids`` where
the model takes them, ``past_key_values.N.key`` and ``.value`` (batch, heads, past_sequence, size); outputs ``logits``
and ``present.N.key``, ``.value``. A prefill has a past of length 0. Sliding windows are in the masks, not in the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from exporters.onnx.runtime import Runtime
from exporters.shared.functional import Function
from passes.capture.capture import is_pretrained
from passes.errors import InputError
from passes.infra.tolerance import ELSEWHERE
from surgery.errors import ExportError

if TYPE_CHECKING:
    import transformers

IDS, MASK, POSITIONS, PAST, PRESENT = "input_ids", "attention_mask", "position_ids", "past_key_values", "present"
LEAST = 7  # tokens of an example: 4 of the past and 3 new ones, so that no two sizes are equal
NEW_TOKENS = 4


class Cached:
    """A causal language model as a function of flat tensors, the cache among them.

    Args:
        inputs: ``input_ids`` and ``attention_mask`` of an example.

    Raises:
        ExportError: the model has no cache of keys and values, or further inputs.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, object]) -> None:
        name = type(model).__name__
        if not is_pretrained(model) or not hasattr(model, "generate") or model.config.is_encoder_decoder:
            raise ExportError(f"use_cache=True is for causal language models of transformers, and {name} is none")
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        if extra := sorted(set(tensors) - {IDS, MASK, POSITIONS}):
            raise ExportError(f"an export with use_cache=True takes {IDS} and {MASK}; remove {', '.join(extra)}")
        if tensors.get(IDS) is None or tensors[IDS].dim() != 2:
            raise InputError(f"an export with use_cache=True needs {IDS} (batch, sequence) among its example_inputs")
        ids = tensors[IDS]
        mask = tensors.get(MASK, torch.ones_like(ids))
        more = -(-LEAST // ids.shape[1])
        self.ids, self.mask = ids.repeat(1, more), torch.cat([mask, torch.ones_like(mask).repeat(1, more - 1)], dim=1)
        self.positions = POSITIONS in inspect.signature(type(model).forward).parameters
        half = (self.ids.shape[1] + 1) // 2
        self.past = half + (half == self.ids.shape[1] - half)
        self.empty = empty(model, self.ids)
        self.inputs = self.at(model, self.past)

    def at(self, model: Function, past: int, new: int | None = None) -> dict[str, torch.Tensor]:
        """The inputs of a call on the example after so many tokens, for so many new ones (all that are left)."""
        stop = self.ids.shape[1] if new is None else past + new
        cache = self.empty
        if past:
            with torch.no_grad():
                out = self.forward(model, **self._call(0, past, cache))
            cache = {name.replace(PRESENT, PAST, 1): t for name, t in out.items() if name.startswith(f"{PRESENT}.")}
        return self._call(past, stop, cache)

    def _call(self, start: int, stop: int, cache: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return call_inputs(self.ids[:, start:stop], self.mask[:, :stop], cache, positions=self.positions)

    def shapes(self, model: Function) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs of a continuation by several tokens, a prefill, and a step of decoding."""
        yield self.inputs
        yield self.at(model, 0)
        yield self.at(model, self.past, 1)

    @staticmethod
    def forward(model: Function, **inputs: object) -> dict[str, torch.Tensor]:
        """Call a model (or its forward) with flat inputs; returns the outputs by their names in the graph."""
        from transformers import DynamicCache

        names = [name for name in inputs if name.startswith(f"{PAST}.") and name.endswith(".key")]
        pairs = [(inputs.pop(name), inputs.pop(f"{name[:-4]}.value")) for name in names]
        cache = DynamicCache(pairs)
        out = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        return {"logits": out.logits, **_flat(out.past_key_values, PRESENT)}

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Names of the free sizes."""
        past = {0: "batch", 2: "past_sequence"}
        known = {IDS: {0: "batch", 1: "sequence"}, MASK: {1: "past_sequence + sequence"}}
        return known | {name: past for name in self.inputs if name.startswith(PAST)}


def empty(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A cache of no tokens, for as many rows as the ids have.

    Raises:
        ExportError: the model keeps something else than keys and values of every token.
    """
    from transformers import DynamicCache

    try:
        with torch.no_grad():
            out = model(input_ids=ids[:, :2], past_key_values=DynamicCache(), use_cache=True, return_dict=True)
        cache = out.past_key_values
        flat = _flat(cache, PAST)
        plain = all(tensor.dim() == 4 and tensor.shape[:3:2] == (len(ids), 2) for tensor in flat.values())
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ExportError(f"{type(model).__name__} has no cache of keys and values: {error}") from error
    if not flat or not plain:
        raise ExportError(f"{type(model).__name__} caches other things than (batch, heads, sequence, size) tensors")
    return {name: t[:, :, :0] for name, t in flat.items()}


def _flat(cache: transformers.Cache, prefix: str) -> dict[str, torch.Tensor]:
    layers = enumerate(cache.layers)
    return {f"{prefix}.{i}.{n}": t for i, layer in layers for n, t in (("key", layer.keys), ("value", layer.values))}


def call_inputs(
    ids: torch.Tensor, mask: torch.Tensor, cache: Mapping[str, torch.Tensor], *, positions: bool
) -> dict[str, torch.Tensor]:
    """The inputs of one call: new tokens, the mask over past and new ones, positions that count unmasked tokens."""
    inputs = {IDS: ids, MASK: mask}
    if positions:
        inputs[POSITIONS] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {**inputs, **cache}


def greedy(
    call: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Mapping[str, torch.Tensor],
    new_tokens: int,
    *,
    positions: bool,
) -> Iterator[torch.Tensor]:
    """Generate greedily: the last position's logits (batch, vocabulary) of each call, each row's best token being the
    next.

    Args:
        call: gives the outputs of one call by name.
        cache: of no tokens.
    """
    for _ in range(new_tokens):
        out = call(call_inputs(ids, mask, cache, positions=positions))
        logits = out["logits"][:, -1]
        yield logits
        ids = logits.argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids, dtype=mask.dtype)], dim=1)
        cache = {name.replace(PRESENT, PAST, 1): t for name, t in out.items() if name.startswith(f"{PRESENT}.")}


def compare_generation(
    cached: Cached, model: Function, runtime: Runtime, coeff: torch.Tensor | None, core: Path | None
) -> int:
    """Generate greedily in PyTorch and in ONNX Runtime; returns how many tokens were compared.

    Args:
        model: PyTorch, at this coeff and with this core.
        coeff, core: of ONNX Runtime; the graph's defaults if None.

    Raises:
        ExportError: a token differs where PyTorch's choice was clear.
    """

    def runs(call: Function) -> Iterator[torch.Tensor]:
        return greedy(call, cached.ids, cached.mask, cached.empty, NEW_TOKENS, positions=cached.positions)

    def exported(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(zip(runtime.outputs, runtime.run(runtime.feed(inputs, coeff), core), strict=True))

    compared = 0
    with torch.no_grad():
        pairs = zip(runs(lambda inputs: cached.forward(model, **inputs)), runs(exported), strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            first, second = ours.double().topk(2, dim=-1).values.unbind(dim=-1)
            clear = first - second > ELSEWHERE[runtime.dtype] * ours.abs().max()
            different = ours.argmax(dim=-1).cpu() != theirs.argmax(dim=-1)
            if (different & clear.cpu()).any():
                row = int((different & clear.cpu()).nonzero()[0])
                raise ExportError(f"ONNX Runtime generates another token than PyTorch: token {i}, row {row}")
            if different.any():  # a tie: what follows cannot be compared
                break
            compared += ours.shape[0]
    return compared
