"""What calibration collects of a site's inputs, in memory that does not depend on the number of tokens.

============  ==============================================  =====================================================
kind          sums over tokens                                used for
============  ==============================================  =====================================================
``moment``    ``x x^T`` (d_in, d_in), or of the output        re-ranking by rms, CorDA
              ``y y^T`` (d_out, d_out), whichever is smaller
``squares``   ``x^2`` (d_in,)                                 ASVD
``absolute``  ``|S Vh x|`` (min(d_out, d_in),)                re-ranking by the mean absolute projection
``contrast``  ``x+`` and ``x-`` (d_in,)                       S-space steering: its projection is linear in x
============  ==============================================  =====================================================

Sums are in float64, of inputs as they are and of outputs formed in float32 or better, as the model forms them. Sites
that read the same input share a statistic, unless it holds something of their weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from passes.errors import InputError
from surgery.errors import VariantError
from surgery.factors.gram import gram_matrix
from surgery.factors.svd import Factorisation, Method, factorise
from surgery.support.determinism import one_thread

Kind = Literal["moment", "squares", "absolute", "contrast"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Pool = Literal["rms", "mean_abs"]
POOLS: dict[Pool, Kind] = {"rms": "moment", "mean_abs": "absolute"}
ROUNDING = 1e-12  # of a mean: a smaller difference of two means is one of the order of summation
FULL: Method = "exact"  # re-ranking looks at every direction, so that there is nothing to gain from a range finder


@dataclass
class Statistic:
    """Running sums at one site, or at all sites that read the same input.

    Attributes:
        kind: one of ``KINDS``.
        side: "input", or "output" where the sums are of the product ``weight x``.
        d_in: size of the input.
        weight: (n, d_in), what inputs are multiplied by first, while sums are formed: ``W``, or ``S Vh``.
        counts: number of tokens by set: "all", or of a contrast "positive" and "negative".
        sums: by name, float64.
    """

    kind: Kind
    side: Literal["input", "output"]
    d_in: int
    weight: torch.Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, x: torch.Tensor, name: str = "all") -> None:
        """Add tokens x (n, d_in) of a set."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        y = (x if self.weight is None else x @ self.weight.to(x.dtype).T).to(product_dtype(x))
        self.counts[name] = self.counts.get(name, 0) + len(x)
        if self.kind == "moment":
            self._sum("moment", gram_matrix(y))
            if self.side == "output":
                self._sum("norm", x.to(y.dtype).square().sum())
        elif self.kind == "squares":
            self._sum("squares", y.square().sum(dim=0))
        elif self.kind == "absolute":
            self._sum("absolute", y.abs().sum(dim=0))
        else:
            self._sum(name, y.to(torch.float64).sum(dim=0))

    def _sum(self, name: str, value: torch.Tensor) -> None:
        value = value.to(torch.float64)
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value.clone()

    def to(self, device: torch.device) -> Statistic:
        """The same sums on a device."""
        return replace(self, sums={name: tensor.to(device) for name, tensor in self.sums.items()})

    @property
    def tokens(self) -> int:
        """Number of tokens, of the smaller set of a contrast."""
        return min(self.counts.values(), default=0)

    @property
    def bytes(self) -> int:
        """Memory of the sums."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.sums.values())

    def mean(self, name: str) -> torch.Tensor:
        """The mean of one of the sums over its tokens."""
        return self.sums[name] / self.counts.get(name, self.counts.get("all", 0))

    def weigh(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows C`` for rows (n, d_in), with ``C = E[x x^T]`` or its diagonal."""
        return rows * self.mean("squares") if self.kind == "squares" else rows @ self.mean("moment")

    def output_moment(self, W: torch.Tensor) -> torch.Tensor:
        """``W C W^T`` (d_out, d_out)."""
        return self.mean("moment") if self.side == "output" else self.weigh(W) @ W.T

    def mean_square(self) -> float:
        """The mean of the diagonal of C."""
        if self.side == "output":
            return float(self.mean("norm")) / self.d_in
        return float((self.mean("squares") if self.kind == "squares" else self.mean("moment").diagonal()).mean())


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that products of inputs are formed in: float64, but float32 on accelerators, whose float64 is slow."""
    return torch.float64 if x.device.type == "cpu" or x.dtype == torch.float64 else torch.float32


def required(statistic: Statistic | None) -> Statistic:
    """The statistic of a variant that has no factors without one."""
    if statistic is None:
        raise VariantError("this variant needs calibration data: pass calibration=")
    return statistic


@one_thread()
def reranked(weight: torch.Tensor, r: int, statistic: Statistic) -> Factorisation:
    """The r singular triples of the largest ``S_i * pool_n |x_n . v_i|``, in descending order of S.

    With the second moment C the rms is ``S_i sqrt(v_i^T C v_i)``, or ``sqrt(u_i^T M u_i)`` with that of the output.
    """
    found = factorise(weight, min(weight.shape), FULL)
    if statistic.kind == "absolute":
        scores = statistic.mean("absolute")
    elif statistic.side == "output":
        scores = ((found.U.T @ statistic.mean("moment")) * found.U.T).sum(dim=1).clamp(min=0).sqrt()
    else:
        scores = found.S * (statistic.weigh(found.Vh) * found.Vh).sum(dim=1).clamp(min=0).sqrt()
    return found.keep(top(scores, r))


@one_thread()
def contrasted(weight: torch.Tensor, r: int, statistic: Statistic) -> Factorisation:
    """The r singular triples of the largest ``|dS|``, ``direction = dS / |dS|`` among them, and the ``midpoint`` of
    both means of ``sqrt(S) h``.

    Raises:
        InputError: the two sets have the same mean, so that there is no direction.
    """
    found = factorise(weight, min(weight.shape), FULL)
    positive, negative = statistic.mean("positive"), statistic.mean("negative")
    root = (found.S / torch.where(found.S[0] > 0, found.S[0], 1.0)).sqrt()  # a direction has no scale
    dS = root * (found.Vh @ (positive - negative))
    chosen = top(dS.abs(), r)
    direction = dS[chosen]
    norm = torch.linalg.vector_norm(direction)
    scale = torch.maximum(positive.abs().max(), negative.abs().max())
    if not norm > ROUNDING * scale:
        raise InputError(
            "the positive and the negative set have the same mean input, so there is no direction"
            if found.S[0] > 0
            else "its weight is zero, so there is no direction"
        )
    midpoint = (found.S.sqrt() * (found.Vh @ ((positive + negative) / 2)))[chosen]
    return found.keep(chosen)._replace(core={"direction": direction / norm, "midpoint": midpoint})


def top(scores: torch.Tensor, r: int) -> torch.Tensor:
    """Indices of the r largest scores in ascending order; of equal scores the first."""
    return scores.argsort(descending=True, stable=True)[:r].sort().values
