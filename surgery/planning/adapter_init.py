"""The factors of every site, from its weight and from calibration, and its initial core."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from passes.analysis.linear_sites import Site
from passes.errors import InputError
from surgery.errors import WeightError
from surgery.factors.statistic import Statistic
from surgery.factors.statistics_file import Statistics
from surgery.factors.svd import Factorisation
from surgery.hosting.attach import AdapterPlan
from surgery.hosting.checks import check_factors
from surgery.modules.base_weights import BaseWeight, base_weight_in
from surgery.modules.core import Core, Factors
from surgery.support.determinism import side_by_side
from surgery.support.progress_bar import track
from surgery.variants import Variant

MEMORY, BYTES = 2**32, 40  # of all factorisations at a time; of one of them for each entry of its weight
Wanted = tuple[Site, Variant, int, str]
"""A site, its variant, its rank, and how it is hosted."""
Note = dict[str, str | float | None]
"""What is remembered of a factorisation: its method and what was measured, the seed, the tokens of calibration."""


def plan_adapters(
    model: nn.Module, wanted: list[Wanted], statistics: Statistics | None, seed: int, *, progress: bool = False
) -> tuple[list[AdapterPlan], dict[str, Note]]:
    """Factorise the weights of sites and make their cores; nothing of the model is touched.

    Returns:
        The plans, and what is noted of each site's factorisation.

    Raises:
        InputError: the statistics do not cover a site, or saw fewer tokens than its rank.
        WeightError: singular values or factors overflow their dtype.
    """
    known = {site.key: _statistic(model, site, config, r, statistics) for site, config, r, _ in wanted}
    bases = {site.key: base_weight_in(model, site) for site, *_ in wanted}
    jobs = (
        (config, matrix, r, known[site.key], seed)
        for site, config, r, _ in wanted
        for matrix in _each(bases[site.key].matrix().detach())
    )
    plans, notes = [], {}
    with contextlib.closing(side_by_side(_factorised, jobs, _workers(model, wanted))) as found:
        for site, config, r, host in track(wanted, "factorising", enabled=progress):
            try:
                parts = [next(found) for _ in range(site.stack or 1)]
            except (InputError, WeightError) as error:
                raise type(error)(f"site {site.key!r}: {error}") from error
            factors, core, note = _made(bases[site.key], site, config, r, parts, seed)
            notes[site.key] = note | {"seed": seed, "tokens": tokens.tokens if (tokens := known[site.key]) else None}
            plans.append(AdapterPlan(site, host, config, factors, core))
    return plans, notes


def _workers(model: nn.Module, wanted: list[Wanted]) -> int:
    """How many weights to factorise at a time: one on an accelerator, on the CPU as many as there is memory for."""
    if any(site.parameter_of(model).device.type != "cpu" for site, *_ in wanted):
        return 1
    largest = max((site.d_out * site.d_in for site, *_ in wanted), default=1)
    return max(1, MEMORY // (BYTES * largest))


def _statistic(
    model: nn.Module, site: Site, config: Variant, r: int, statistics: Statistics | None
) -> Statistic | None:
    if statistics is None or site.stack is not None:
        return None
    base = base_weight_in(model, site)
    statistic = statistics.of(site, config.statistic, base.fingerprint(), base.device)
    if statistic.kind != "contrast" and statistic.tokens < r:
        raise InputError(
            f"site {site.key!r}: calibration showed it {statistic.tokens} tokens, fewer than its rank {r}; "
            "use more data, or a smaller r"
        )
    return statistic


def _each(matrices: torch.Tensor) -> Iterator[torch.Tensor]:
    """A matrix, or every one of a stack."""
    yield from (matrices,) if matrices.dim() == 2 else matrices


def _factorised(job: tuple[Variant, torch.Tensor, int, Statistic | None, int]) -> Factorisation:
    config, matrix, r, statistic, seed = job
    with torch.inference_mode(False), torch.no_grad():  # which a thread does not have of the one that started it
        return config.factorise(matrix, r, statistic, seed)


def _made(
    base: BaseWeight, site: Site, config: Variant, r: int, parts: list[Factorisation], seed: int
) -> tuple[Factors, Core, Note]:
    """Factors in the dtype that is stored, the initial core, and what is noted of the factorisation."""
    with torch.inference_mode(False), torch.no_grad():  # cores made in inference mode could never be trained
        found = parts[0] if site.stack is None else _stacked(parts)
        dtype = getattr(torch, config.factors_dtype) if config.factors_dtype else base.dtype
        factors = as_factors(found, dtype, base.device)
        check_factors(site, factors)
        core_dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        given = {name: tensor for name, tensor in found.core.items() if name in config.frozen}
        tensors = initial_core(config, site.key, r, seed, site.stack) | given
        core = Core(tensors, core_dtype, base.device, config.frozen)
    note: Note = {"method": found.method, "error": found.error, "residual": found.residual, "energy": found.energy}
    return factors, core, note


def as_factors(found: Factorisation | Factors, dtype: torch.dtype, device: torch.device) -> Factors:
    """The factors of a site as they are stored."""
    # a size of one may have any stride, by which kernels are chosen: a reload would then have other bits
    return Factors(*(torch.empty(t.shape, dtype=dtype, device=device).copy_(t) for t in (found.U, found.S, found.Vh)))


def factorised(
    config: Variant, matrices: torch.Tensor, r: int, statistic: Statistic | None, seed: int
) -> Factorisation:
    """Factorise the matrix of one site, or its stack of them, with the bits that :func:`plan_adapters` gives it."""
    if matrices.dim() == 2:
        return _factorised((config, matrices, r, statistic, seed))
    return _stacked([_factorised((config, matrix, r, None, seed)) for matrix in matrices])


def _stacked(found: list[Factorisation]) -> Factorisation:
    """The factors of a stack; of what is noted the worst, of the energy the mean."""
    U, S, Vh = (torch.stack([getattr(f, name).to(torch.float64) for f in found]) for name in ("U", "S", "Vh"))
    method = Counter(factors.method for factors in found).most_common(1)[0][0]
    error, residual = max(f.error for f in found), max(f.residual for f in found)
    return Factorisation(U, S, Vh, method, error, residual, sum(f.energy for f in found) / len(found))


def initial_core(config: Variant, key: str, r: int, seed: int, stack: int | None = None) -> dict[str, torch.Tensor]:
    """The core that a site starts with; every site, and every matrix of a stack, has random numbers of its own."""
    if stack is not None:
        cores = [initial_core(config, f"{key}[{i}]", r, seed) for i in range(stack)]
        return {name: torch.stack([core[name] for core in cores]) for name in cores[0]}
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()  # the CPU's generator reads 32 bits of a seed
    return config.init_core(r, torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
