"""Calibration: run data through the intact model once, and collect what the factors of every site are chosen by.

The only statistics loop. Its memory does not depend on the number of tokens; padding is left out; sites that read the
same input share one statistic; the model is left as it was.

On the CPU, a small model runs in one thread, so that the same data gives the same bits with any number of threads. A
large one keeps all threads, with which products of few tokens may round differently, unless
``torch.use_deterministic_algorithms(True)`` asks for one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass

import torch
from torch import nn

from passes.analysis.linear_sites import Site
from passes.capture.activations import observed
from passes.capture.capture import forward_call, is_pretrained, keyword_inputs
from passes.errors import InputError
from passes.ir.forward_context import Call, ExampleInputs, copied, inference_mode_of, state_kept
from passes.ir.torch_internals import tree_iter, tree_map_only
from surgery.factors.padding import Tokens
from surgery.factors.statistic import Kind, Statistic
from surgery.factors.statistics_file import Statistics
from surgery.factors.svd import factorise
from surgery.hosting.state import state_of
from surgery.modules.base_weights import base_weight_in
from surgery.support.determinism import one_thread
from surgery.support.progress_bar import track

SMALL = 2**26  # parameters of a model that always runs in one thread


Batch = ExampleInputs | list[object]
"""Example inputs; a ``DataLoader`` may give lists."""

Batches = Iterable[Batch] | ExampleInputs


@dataclass(frozen=True)
class Contrast:
    """Two sets of inputs that differ in what is to be steered.

    Attributes:
        positive, negative: iterables of batches (dict, tuple or tensor).
        pool: which tokens of a row count: the "last" that is no padding, the "mean" of the row, or "all" alike.
    """

    positive: Batches
    negative: Batches
    pool: str = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.pool, str) or self.pool not in ("last", "mean", "all"):
            raise InputError(f"pool must be 'last', 'mean' or 'all', found {self.pool!r:.80}")


Calibration = Batches | Contrast | Statistics
"""Batches, one batch, two sides to contrast, or what was collected before."""


def batches_of(data: object, name: str = "calibration") -> Iterable[Batch]:
    """The batches of calibration data; a single batch is one too.

    Raises:
        InputError: the data is no iterable of batches.
    """
    if isinstance(data, (torch.Tensor, Mapping)):
        return [data]
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise InputError(f"{name} must be an iterable of batches (dict, tuple or tensor), found {type(data).__name__}")
    return data


def first_batch(calibration: Calibration) -> tuple[ExampleInputs | None, Calibration]:
    """The first batch of calibration data, and the data with that batch still in it, be it read once only."""
    if isinstance(calibration, Statistics):
        return None, calibration
    if isinstance(calibration, Contrast):
        first, positive = _first_of(calibration.positive)
        return first, Contrast(positive, calibration.negative, calibration.pool)
    return _first_of(calibration)


def _first_of(data: object) -> tuple[ExampleInputs | None, Iterable[Batch]]:
    data = batches_of(data)
    if not isinstance(data, Iterator):
        numbers = random.getstate()
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
            first = next(iter(data), None)
        random.setstate(numbers)
        return None if first is None else _batch(first), data
    first = next(data, None)
    return (None, data) if first is None else (_batch(first), itertools.chain([first], data))


def _batch(batch: Batch) -> ExampleInputs:
    """A batch as inputs are written; a ``DataLoader`` gives lists."""
    return tuple(batch) if isinstance(batch, list) else batch


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    called: Collection[str],
    kinds: Mapping[str, Kind],
    calibration: object,
    *,
    progress: bool = False,
) -> Statistics:
    """Run the data through an intact model, once, and collect a statistic at every site.

    Args:
        called: keys of the sites whose module is called for every product.
        kinds: the kind of statistic by site.
        calibration: an iterable of batches, or a :class:`Contrast` for statistics of that kind; statistics that were
            collected before are given back as they are.

    Raises:
        InputError: there is no batch, the model does not run on one, an activation is not finite, or a site is never
            reached; the model is as it was.
    """
    if isinstance(calibration, Statistics):
        return calibration
    contrasts = [key for key, kind in kinds.items() if kind == "contrast"]
    if contrasts and len(contrasts) < len(kinds):
        other = next(key for key in kinds if key not in contrasts)
        raise InputError(
            f"site {contrasts[0]!r} needs a Contrast and site {other!r} an iterable of batches: one calibration cannot "
            "serve both; calibrate and operate on them one after the other"
        )
    if any((kind == "contrast") != isinstance(calibration, Contrast) for kind in kinds.values()):
        wanted = "Contrast(positive, negative)" if "contrast" in kinds.values() else "an iterable of batches"
        raise InputError(f"calibration must be {wanted} for this variant, found {type(calibration).__name__}")
    if stacks := [site.key for site in sites if site.stack is not None]:
        warnings.warn(
            f"site {stacks[0]!r}: a stack of matrices is not calibrated, since what reaches each of them is not seen; "
            f"its factors are the largest singular directions ({len(stacks)} such)",
            stacklevel=4,
        )
        sites = [site for site in sites if site.stack is None]
    statistics = _empty(model, sites, kinds)
    leaders = {id(statistic): key for key, statistic in reversed(statistics.items())}
    watched = [site for site in sites if leaders[id(statistics[site.key])] == site.key]
    run = _Run(model, statistics, getattr(calibration, "pool", None))
    exact = torch.are_deterministic_algorithms_enabled() or sum(p.numel() for p in model.parameters()) <= SMALL
    sets = {"calibration": calibration}
    if isinstance(calibration, Contrast):
        sets = {"positive": calibration.positive, "negative": calibration.negative}
    for name, data in sets.items():
        with one_thread(exact), _at_identity(model), _looked_at(model), observed(model, watched, called, run.see):
            run.all(data, name, progress=progress)
    run.finish(watched)
    for statistic in statistics.values():
        statistic.weight = None
    prints = {site.key: base_weight_in(model, site).fingerprint() for site in sites}
    return Statistics(statistics, prints, run.pool)


@contextlib.contextmanager
def _looked_at(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode; hooks that see what it computes are put on inside, so that what they saw stays."""
    with state_kept(model), inference_mode_of(model), torch.no_grad():
        yield


@contextlib.contextmanager
def _at_identity(model: nn.Module) -> Iterator[None]:
    """Let a model whose other sites are operated on compute what it did before: coeff 0 is an exact identity."""
    state = state_of(model)
    if state is None:
        yield
        return
    steering, buffers = state.steering, dict(state.steering._buffers)
    coefficient, state.coefficient = state.coefficient, None
    steering._buffers["coeff"] = steering.coeff.new_zeros(())
    steering.refresh_copies()
    try:
        yield
    finally:
        state.coefficient = coefficient
        steering._buffers.update(buffers)
        steering.refresh_copies()


def _empty(model: nn.Module, sites: Sequence[Site], kinds: Mapping[str, Kind]) -> dict[str, Statistic]:
    """A statistic for every site: one for all that read the same input, where that is smaller than one for each."""
    groups: dict[tuple[Kind, object], list[Site]] = {}
    for site in sites:
        group = (site.key,) if site.group is None else site.group
        groups.setdefault((kinds[site.key], group), []).append(site)
    found: dict[str, Statistic] = {}
    for (kind, _), members in groups.items():
        d_in = members[0].d_in
        outputs = kind == "moment" and sum(site.d_out**2 for site in members) < d_in**2
        if not outputs and kind != "absolute":
            found |= dict.fromkeys((site.key for site in members), Statistic(kind, "input", d_in))
            continue
        for site in members:
            weight = base_weight_in(model, site).matrix().detach()
            if kind == "absolute":
                full = factorise(weight, min(weight.shape), "exact")
                weight = (full.S[:, None] * full.Vh).to(torch.promote_types(weight.dtype, torch.float32))
            found[site.key] = Statistic(kind, "output", d_in, weight)
    return {site.key: found[site.key] for site in sites}


class _Run:
    """The loop over batches, and what it feeds the statistics."""

    def __init__(self, model: nn.Module, statistics: Mapping[str, Statistic], pool: str | None) -> None:
        self.model, self.statistics, self.pool = model, statistics, pool
        self.finite: dict[str, torch.Tensor] = {}
        self.unmatched: set[str] = set()
        self.tokens: Tokens | None = None
        self.name = "calibration"
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def all(self, data: object, name: str, *, progress: bool) -> None:
        """Run every batch of a set."""
        self.name, count = name, 0
        data = batches_of(data, name)
        total = len(data) if isinstance(data, Sized) else None
        title = f"calibrating ({name})" if self.pool else "calibrating"
        for batch in track(data, title, enabled=progress, total=total):
            self._batch(_batch(batch), count)
            count += 1
        if not count:
            raise InputError(f"{name} gave no batch: it is empty, or a generator that has been read already")

    def _batch(self, batch: object, index: int) -> None:
        args, kwargs = self._call(batch)
        self.tokens = Tokens(self._named((args, kwargs)))
        self.finite.clear()
        try:
            self.model(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            raise InputError(
                f"{type(self.model).__name__} does not run on {self.name} batch {index}: {reason}"
            ) from error
        if bad := [key for key, flag in self.finite.items() if not flag]:
            raise InputError(f"site {bad[0]!r}: its input is not finite on {self.name} batch {index}")

    def _call(self, batch: object) -> Call:
        inputs = copied(forward_call(batch))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_iter(inputs)):
            raise InputError(f"{self.name} has a tensor on the meta device, which holds no values")
        call: Call = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), inputs)
        if is_pretrained(self.model) and getattr(self.model.config, "use_cache", False):
            call[1].setdefault("use_cache", False)
        return call

    def _named(self, call: Call) -> Call:
        """A call with its positional arguments named, so that a mask is known for one."""
        try:
            named = keyword_inputs(self.model, call)
        except (TypeError, ValueError):  # the model says so itself, or has no signature
            return call
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) and "labels" in named:
            named.setdefault("decoder_input_ids", named["labels"])  # the model makes these of its labels
        return (), named

    def see(self, key: str, x: torch.Tensor) -> None:
        """Add the tokens of an input to the statistic of its site."""
        assert self.tokens is not None
        if self.pool is None:
            x, matched = self.tokens.select(x)
            if not matched:
                self.unmatched.add(key)
        else:
            x = self.tokens.pool(key, x, self.pool)
        fine = torch.isfinite(x.sum(dtype=torch.float32 if x.device.type == "mps" else torch.float64))
        self.finite[key] = self.finite[key] & fine if key in self.finite else fine
        self.statistics[key].add(x, self.name if self.pool else "all")

    def finish(self, watched: Sequence[Site]) -> None:
        """Check that the data reached every site.

        Raises:
            InputError: names a site that it did not reach.
        """
        sets = {"positive", "negative"} if self.pool else {"all"}
        for site in watched:
            counts = self.statistics[site.key].counts
            if missing := sorted(name for name in sets if not counts.get(name)):
                which = f"the {missing[0]} set" if self.pool else "the calibration data"
                raise InputError(f"site {site.key!r}: {which} never reaches it; leave it out with exclude_modules")
        if self.unmatched:
            warnings.warn(
                f"{len(self.unmatched)} sites see tokens that cannot be told from padding, which then counts too: "
                f"{', '.join(sorted(self.unmatched)[:5])}",
                stacklevel=5,
            )
