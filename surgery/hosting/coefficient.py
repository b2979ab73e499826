"""A coefficient that differs between rows or tokens, and what of it a call of the root is to use."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from passes.errors import InputError
from passes.ir.torch_internals import tree_iter

Rows = Literal["exact", "repeat", "tile"]
ROWS = ("exact", "repeat", "tile")
ENCODER = ("input_ids", "inputs_embeds", "input_features", "input_values", "attention_mask")
DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
NO_WAY = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")  # change no way through a model
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

    def of_call(self, call: Sequences, batch_dim: int, *, generating: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The coefficient of one call: (batch,), or (batch, positions), for each sequence.

        Args:
            batch_dim: the dimension of the model's inputs that the rows lie along, 0 or 1.

        Raises:
            InputError: it does not fit the call.
        """
        rows = self.rows or ("repeat" if generating else "exact")
        if self.value.dim() == 1:
            sequence = call.first
            return (self.value if sequence is None else spread(self.value, sequence.shape[batch_dim], rows)), None
        second = None
        if self.second is not None:
            second = spread(self.second, self.second.shape[0], rows)
            if call.encoder is not None:
                second = self._columns(self.second, call.encoder, 0, rows, batch_dim)
        if call.main is None:
            if call.encoder is not None and self.second is not None:
                return self.value, second
            raise InputError(f"{call.name} was called without an input whose positions coeff can follow")
        return self._columns(self.value, call.main, call.past, rows, batch_dim), second

    def batch_dims(self, call: Sequences) -> tuple[int, ...]:
        """The dimensions of the inputs of a call that may be those of the rows, by their sizes; the first one first."""
        x, count = call.first, len(self.value)
        if x is None:
            return ()
        most = 1 if call.of_hub or x.dim() < (3 if x.is_floating_point() else 2) else 2
        sizes = x.shape[:most]
        exact = [dim for dim, size in enumerate(sizes) if count in (1, size)]
        return tuple(exact or [dim for dim, size in enumerate(sizes) if size % count == 0])

    def _columns(
        self, value: torch.Tensor, sequence: torch.Tensor, past: int, rows: Rows, batch_dim: int
    ) -> torch.Tensor:
        """Columns ``past ... past + q`` of a value, for a sequence of q positions in this call."""
        if sequence.dim() < 2:
            raise InputError(f"coeff is given for tokens, but the model was called with shape {tuple(sequence.shape)}")
        batch, length, columns = sequence.shape[batch_dim], sequence.shape[1 - batch_dim], value.shape[1]
        stop = past + length
        if columns == 1:
            return spread(value, batch, rows)
        if stop > columns and self.beyond is None:
            raise InputError(
                f"coeff has {columns} columns, but this call goes to position {stop}; give more, or beyond= for what "
                "comes after them"
            )
        found = value[:, past:stop]
        if found.shape[1] < length:
            after = found.new_full((len(value), length - found.shape[1]), float(self.beyond or 0.0))
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


class Sequences:
    """The sequences of one call of a model.

    Attributes:
        name: of the model's class, for errors.
        given: all arguments by name.
        of_hub: whether the model is one of ``transformers``, whose rows always come first.
        main: what positions are counted along (ids, embeddings, or the first tensor), or None.
        encoder: the encoder's input of a model with two sequences, where its encoder runs in this call.
    """

    def __init__(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.name, self.of_hub = type(model).__name__, hasattr(model, "main_input_name")
        names = list(inspect.signature(model.forward).parameters)
        given = self.given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.dim()}
        first = next(iter(tensors.values()), None)
        if first is None:  # a list or a dict of tensors
            first = next((t for t in tree_iter(given) if isinstance(t, torch.Tensor) and t.dim()), None)
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

    @property
    def past(self) -> int:
        """Positions of the main sequence that are in the cache already."""
        return _cached(next((self.given[n] for n in CACHES if self.given.get(n) is not None), None))

    @property
    def first(self) -> torch.Tensor | None:
        """What tells the number of rows."""
        return self.encoder if self.main is None else self.main

    def kind(self) -> tuple[object, ...]:
        """What is alike in calls that take the same way through a model, whatever the sizes and the contents."""
        given = ((name, value) for name, value in self.given.items() if value is not None and name not in NO_WAY)
        return tuple(sorted((name, *_kind(value)) for name, value in given))


def _kind(value: object) -> tuple[str, str]:
    if isinstance(value, torch.Tensor):
        return "tensor", f"{value.dim()} {value.is_floating_point()}"
    return type(value).__name__, repr(value) if isinstance(value, (bool, str)) else ""


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
