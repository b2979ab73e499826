"""What a lowering costs: a model of FLOPs, bytes and launches, and the schedule that follows from it.

A kernel takes the longer of its FLOPs over the peak rate and its bytes over the bandwidth, plus a launch. Only ratios
matter; the rates are round numbers of their kind of device, and constant, so that a choice never depends on the load of
the machine. ``surgery.planning.lowering_autotune`` times the user's own inputs instead.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from passes.errors import InputError
from passes.ir.torch_internals import OpOverload, TorchDispatchMode
from surgery.lowerings import ALWAYS, REGISTRY, Schedule, Size, Work
from surgery.lowerings._site import LinearSite
from surgery.variants import Variant


class Rates(NamedTuple):
    """FLOPs per second, bytes per second, seconds per launch."""

    flops: float
    bytes: float
    launch: float


RATES = {"cpu": Rates(1.5e11, 2e10, 5e-6), "cuda": Rates(4e14, 3e12, 5e-6)}
FULL_WIDTH = 8  # times slower than in half precision an accelerator multiplies in float32
CHECKED = 3  # launches that comparing a core takes
GRID = tuple(dict.fromkeys(round(2 ** (k / 4)) for k in range(4 * 20)))


def seconds(kernels: list[Work], rates: Rates) -> float:
    """Predicted duration of kernels that run one after the other."""
    return sum(max(k.flops / rates.flops, k.bytes / rates.bytes) + k.launches * rates.launch for k in kernels)


def rates_of(device: str, itemsize: int) -> Rates:
    """Rates of a device type for entries of so many bytes; those of CUDA for any accelerator."""
    found = RATES.get(device, RATES["cuda"])
    if device == "cpu":
        return found
    return found if itemsize <= 2 else found._replace(flops=found.flops / FULL_WIDTH)


def base_work(size: Size, *, training: bool) -> list[Work]:
    """The plain product, and in training that of dx; the base is frozen."""
    product = Work.product(size.tokens, size.d_out, size.d_in, size.itemsize)
    return [product, product] if training else [product]


def predicted(name: str, size: Size, device: str, *, training: bool) -> float:
    """Predicted overhead of a lowering over the plain base, as a share of the base's time."""
    rates = rates_of(device, size.itemsize)
    extra = seconds(REGISTRY[name].work(size, training=training), rates)
    extra += CHECKED * rates.launch * (not REGISTRY[name].steers_rows)
    return extra / seconds(base_work(size, training=training), rates)


def predicted_change(size: Size, stack: int, device: str, *, cached: bool, training: bool) -> float:
    """Predicted overhead of a weight that is changed as a whole, as a share of the time of the base's own product.

    Args:
        stack: matrices of the weight; each token goes through one of them, all are changed.
        cached: whether one change serves several forwards, as in inference.
    """
    rates, wide = rates_of(device, size.itemsize), max(size.itemsize, 4)
    entries = stack * size.d_out * size.d_in
    make = [
        Work.product(size.d_out, size.d_in, size.r, wide).times(stack),
        Work.pointwise(entries, wide, 2 if size.itemsize == wide else 6),
    ]
    if training:  # the gradient of the change, by the core's tensors
        make.append(Work.product(size.d_out, size.r, size.d_in, wide).times(stack))
    base = base_work(size, training=training)
    read = Work(0.0, float(size.itemsize * (stack - 1) * size.d_out * size.d_in), 0.0)
    extra = seconds([work.amortised() for work in make] if cached else make, rates)
    return extra / seconds([*base, read], rates)


@functools.lru_cache(maxsize=1024)
def cheapest(names: tuple[str, ...], size: Size, device: str, training: bool) -> tuple[tuple[int, str], ...]:
    """The cheapest of some lowerings by number of tokens."""
    steps: list[tuple[int, str]] = []
    for tokens in GRID:
        at = size._replace(tokens=tokens)
        best = min(names, key=lambda name: predicted(name, at, device, training=training))
        if not steps or steps[-1][1] != best:
            steps.append((tokens if steps else 0, best))
    return tuple(steps)


def candidates(site: LinearSite) -> tuple[str, ...]:
    """The lowerings to choose from at a site, the low-rank one first."""
    fit = (name for name, lowering in REGISTRY.items() if lowering.advised(site) and lowering.why_not(site) is None)
    return tuple(sorted(fit, key=lambda name: name != ALWAYS))


@functools.lru_cache(maxsize=256)
def core_macs(variant: Variant, r: int) -> int:
    """Multiply-accumulates per token of the matrix products in a core of rank r, counted on its delta."""
    counted = []
    for tokens in (32, 64):  # what is done once in a forward, and not for each token, cancels
        with FlopCounterMode(display=False) as counter:
            variant.delta(*_meta(variant, r, tokens))
        counted.append(counter.get_total_flops())
    return int(counted[1] - counted[0]) // 64


@functools.lru_cache(maxsize=256)
def core_launches(variant: Variant, r: int) -> int:
    """Operations of a core in inference that are not views, counted on its delta."""
    h, S, core, coeff = _meta(variant, r, 1)
    prepared: Any = SimpleNamespace(**vars(core), **variant.prepare(core))
    counter = _Launches()  # type: ignore[no-untyped-call]
    with torch.no_grad(), counter:
        variant.delta(h, S, prepared, coeff)
    return counter.count


class _Launches(TorchDispatchMode):
    count: int = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _meta(variant: Variant, r: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor]:
    """What the delta of a core of rank r takes, without data."""
    tensors = {name: tensor.to("meta") for name, tensor in variant.init_core(r, torch.Generator()).items()}
    S, coeff = torch.ones(r, device="meta"), torch.ones((), device="meta")
    return torch.ones(tokens, r, device="meta"), S, SimpleNamespace(**tensors), coeff


def size_of(site: LinearSite, tokens: int) -> Size:
    """What the cost of a site depends on."""
    r, (d_out, d_in) = site.factors.S.shape[-1], (site.factors.U.shape[-2], site.factors.Vh.shape[-1])
    variant, item = site.variant, site.base_weight.dtype.itemsize
    return Size(tokens, d_out, d_in, r, core_macs(variant, r), item, core_launches(variant, r))


def schedule_of(site: LinearSite, lowering: str) -> Schedule:
    """When to use which lowering at a site.

    Args:
        lowering: "auto", or a name that is used wherever it is possible: a coeff per row has no single weight.

    Raises:
        InputError: the named lowering does not exist, or does not fit the site.
    """
    device, size = site.factors.U.device.type, size_of(site, 1)
    if lowering in ("auto", "measure"):
        names = candidates(site)
        steering = tuple(name for name in names if REGISTRY[name].steers_rows)
        return Schedule(*(cheapest(n, size, device, training) for n in (names, steering) for training in (False, True)))
    if lowering not in REGISTRY:
        raise InputError(f"lowering must be 'auto', 'measure' or one of {', '.join(REGISTRY)}; found {lowering!r}")
    reason = REGISTRY[lowering].why_not(site)
    if reason:
        raise InputError(f"lowering {lowering!r} is not possible: {reason}")
    named, rows = ((0, lowering),), ((0, lowering if REGISTRY[lowering].steers_rows else ALWAYS),)
    return Schedule(named, named, rows, rows)
