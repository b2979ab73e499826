"""Other contents for a row of an input: valid ones, of the same shape, which differ at every position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

VALUES = 8  # distinct integers that contents are drawn from, at least, where the vocabulary has them


@dataclass(frozen=True)
class Vocabulary:
    """The integers of a model's inputs.

    Attributes:
        special: those that have a meaning of their own (padding, places of images), and stay where they are.
        size: how many there are.
    """

    special: frozenset[int]
    size: int

    @classmethod
    def of(cls, model: nn.Module) -> Vocabulary:
        """What a model's configuration tells, or else its embeddings."""
        config = getattr(model, "config", None)
        nested = [config, *(vars(config).values() if config is not None else ())]
        settings = {k: v for part in nested if hasattr(part, "__dict__") for k, v in vars(part).items()}
        special: set[int] = set()
        for name, value in settings.items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
        size = settings.get("vocab_size")
        if not isinstance(size, int):
            size = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
        return cls(frozenset(special), size)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that contents of a tensor are drawn from: its own, and some more where these are few."""
        own = [v for v in x.unique().tolist() if v >= 0 and v not in self.special]
        if len(own) < VALUES and (not own or own[-1] < self.size):
            own += [v for v in range(self.size) if v not in self.special and v not in own][: VALUES - len(own)]
        if len(own) == 1:  # a time step, or a class
            own.append(own[0] - 1 if own[0] else 1)
        return torch.tensor(sorted(own), dtype=x.dtype, device=x.device)

    def shifted(self, row: torch.Tensor, values: torch.Tensor, steps: int, *, same: bool = False) -> torch.Tensor:
        """Each integer replaced by one some steps after it, in turn.

        Args:
            same: by the one that the first of them is replaced by.
        """
        at = torch.searchsorted(values, row)
        ordinary = (at < len(values)) & (values[at.clamp(max=len(values) - 1)] == row)
        if not ordinary.any():  # the beginning of a text that is to be generated
            return torch.full_like(row, int(values[steps % len(values)]))
        new = values[(at + steps) % len(values)]
        return torch.where(ordinary, new[ordinary][0] if same else new, row)


def noisy(row: torch.Tensor, scale: float, seed: int, *, same: bool = False) -> torch.Tensor:
    """Normal noise of a scale added.

    Args:
        same: one vector of noise in place of every vector.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(row.shape[-1:] if same else row.shape, generator=generator, dtype=torch.float64)
    return noise.to(row).expand_as(row) if same else row + noise.to(row)


def noise_scale(x: torch.Tensor) -> float:
    """The standard deviation of a tensor's finite entries; their mean size where they are all alike, or 1."""
    finite = x[x.isfinite()].to(torch.float64)
    if not finite.numel():
        return 1.0
    return float(finite.std(correction=0)) or float(finite.abs().mean()) or 1.0
