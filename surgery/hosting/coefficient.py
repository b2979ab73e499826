"""A coefficient that differs between rows or tokens, and what of it a call of the root is to use."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from passes.errors import InputError

Rows = Literal["exact", "repeat", "tile"]
ROWS = ("exact", "repeat", "tile")
ENCODER = ("input_ids", "inputs_embeds", "input_features", "input_values", "attention_mask")
DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
CACHES = ("past_key_values", "past_key_value", "cache_params")


@dataclass(frozen=True)
class Coefficient:
    """What was set: (rows,), or (rows, columns of the model's main input).

    Attributes:
        value: along the main sequence.
        second: along the other sequence of a model that has two (its encoder's).
        rows: how rows relate to the batch of a call; None for "exact", and "repeat" inside of ``generate``.
        beyond: of tokens after the last column; None refuses them.
    """

    value: torch.Tensor
    second: torch.Tensor | None = None
    rows: Rows | None = None
    beyond: float | None = None

    def of_call(
        self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], *, generating: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The coefficient of one call: (batch,), or (batch, positions), for each sequence.

        Raises:
            InputError: it does not fit the call.
        """
        call = _Call(model, args, kwargs)
        rows = self.rows or ("repeat" if generating else "exact")
        if self.value.dim() == 1:
            sequence = call.encoder if call.main is None else call.main
            return (self.value if sequence is None else spread(self.value, sequence.shape[0], rows)), None
        second = None
        if self.second is not None:
            second = spread(self.second, self.second.shape[0], rows)
            if call.encoder is not None:
                second = self._columns(self.second, call.encoder, 0, rows)
        if call.main is None:
            if call.encoder is not None and self.second is not None:
                return self.value, second
            raise InputError(f"{type(model).__name__} was called without an input whose positions coeff can follow")
        return self._columns(self.value, call.main, call.past, rows), second

    def _columns(self, value: torch.Tensor, sequence: torch.Tensor, past: int, rows: Rows) -> torch.Tensor:
        """Columns ``past ... past + q`` of a value, for a sequence of q positions in this call."""
        if sequence.dim() < 2:
            raise InputError(f"coeff is given for tokens, but the model was called with shape {tuple(sequence.shape)}")
        batch, stop, columns = sequence.shape[0], past + sequence.shape[1], value.shape[1]
        if columns == 1:
            return spread(value, batch, rows)
        if stop > columns and self.beyond is None:
            raise InputError(
                f"coeff has {columns} columns, but this call goes to position {stop}; give more, or beyond= for what "
                "comes after them"
            )
        found = value[:, past:stop]
        if found.shape[1] < sequence.shape[1]:
            after = found.new_full((len(value), sequence.shape[1] - found.shape[1]), float(self.beyond or 0.0))
            found = torch.cat([found, after], 1)
        return spread(found, batch, rows).contiguous()


def spread(value: torch.Tensor, batch: int, rows: Rows) -> torch.Tensor:
    """One entry (or line) for each row of a batch.

    Raises:
        InputError: the rows do not fit the batch.
    """
    count = len(value)
    if count in (1, batch):
        return value
    if rows == "exact" or batch % count:
        advice = "" if batch % count else "; rows='repeat' serves beams, rows='tile' guidance"
        raise InputError(f"coeff has {count} rows, but the model was called with a batch of {batch}{advice}")
    return (
        value.repeat_interleave(batch // count, 0)
        if rows == "repeat"
        else value.repeat(batch // count, *[1] * (value.dim() - 1))
    )


class _Call:
    """The sequences of one call of a model.

    Attributes:
        main: what positions are counted along (ids, embeddings, or the first tensor), or None.
        encoder: the encoder's input of a model with two sequences, where its encoder runs in this call.
        past: positions of the main sequence that are in the cache already.
    """

    def __init__(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        names = list(inspect.signature(model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.dim()}
        first = next(iter(tensors.values()), None)
        self.encoder: torch.Tensor | None = None
        if any(name in names for name in DECODER):
            self.main = next((tensors[n] for n in DECODER if n in tensors), None)
            if given.get("encoder_outputs") is None:
                self.encoder = next((tensors[n] for n in ENCODER if n in tensors), first)
            if self.main is None and self.encoder is None:
                self.main = first
        else:
            preferred = (getattr(model, "main_input_name", ""), "input_ids", "inputs_embeds")
            self.main = next((tensors[n] for n in preferred if n in tensors), first)
        self.past = _cached(next((given[n] for n in CACHES if given.get(n) is not None), None))


def _cached(cache: Any) -> int:
    """How many positions a key-value cache holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:
        return int(cache[0][0].shape[-2])  # (key, value) for each layer
    except (TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"cannot tell how many positions a {type(cache).__name__} holds; coeff by token needs it"
        ) from error
