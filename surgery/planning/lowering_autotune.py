"""Time the lowerings of each kind of site on the user's own inputs, and keep where one overtakes another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from passes.capture.capture import default_inputs, forward_call
from passes.errors import InputError
from passes.ir.forward_context import Call, ExampleInputs, copied, inference_mode_of, state_kept
from surgery.hosting.called_module import ATTRIBUTE, Called
from surgery.hosting.state import adapters_of
from surgery.hosting.subclasses import without
from surgery.lowerings import REGISTRY, Schedule
from surgery.lowerings._cost_model import candidates
from surgery.modules.adapter import Adapter
from surgery.support.progress_bar import track

SHARES = (1, 4, 16, 64)  # of the tokens of the inputs; and a single one
REPEATS = 5
Steps = tuple[tuple[int, str], ...]


def measure(model: nn.Module, example_inputs: ExampleInputs | None = None, *, progress: bool = False) -> None:
    """Set the schedule of every called site by what the lowerings take on the example inputs.

    Sites of equal sizes, dtype and variant are timed once. For each number of tokens (those of the inputs, shares of
    them, and one) the fastest is kept; between two numbers the change is put at their geometric mean.

    Raises:
        InputError: there are no example inputs, or the model does not run on them.
    """
    example_inputs = default_inputs(model) if example_inputs is None else example_inputs
    if example_inputs is None:
        raise InputError("lowering='measure' needs example_inputs to time the lowerings on")
    called = {key: site for key, site in adapters_of(model).items() if site.host.name == "module"}
    sites = {key: site for key, site in called.items() if not site.host.convolves}  # which have one form
    kinds: dict[object, list[tuple[Adapter, torch.Tensor]]] = {}
    for site, x in _inputs(model, list(sites.values()), forward_call(example_inputs)):
        shape = (tuple(site.weight.shape), tuple(site.factors.U.shape), x.shape, x.dtype, x.device)
        kinds.setdefault((shape, site.variant, site.layout, site.bias is None), []).append((site, x))
    with state_kept(model, watched=False):  # a watch takes time
        schedules = [_timed(*found[0]) for found in track(list(kinds.values()), "timing lowerings", enabled=progress)]
    for found, schedule in zip(kinds.values(), schedules, strict=True):
        for site, _ in found:
            site.lowering, site.schedule = "measure", schedule


def _inputs(model: nn.Module, sites: list[Adapter], call: Call) -> list[tuple[Adapter, torch.Tensor]]:
    """One input of each site that a forward reaches."""
    found: dict[int, tuple[Adapter, torch.Tensor]] = {}

    def see(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        adapter: Adapter = module._modules[ATTRIBUTE]  # type: ignore[assignment]
        x = args[0] if args else next(iter(kwargs.values()))
        found.setdefault(id(adapter), (adapter, x.detach()))

    with state_kept(model), inference_mode_of(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for site in sites:
            site.host.owner.register_forward_pre_hook(see, with_kwargs=True)  # gone after the block
        args, kwargs = copied(call)
        model(*args, **kwargs)
    return list(found.values())


def _timed(site: Adapter, x: torch.Tensor) -> Schedule:
    x = x.reshape(-1, x.shape[-1])
    counts = sorted({1} | {max(1, len(x) // share) for share in SHARES})
    names = candidates(site)
    steering = tuple(name for name in names if REGISTRY[name].steers_rows)
    return Schedule(*(_steps(site, x, counts, n, training=t) for n in (names, steering) for t in (False, True)))


def _steps(site: Adapter, x: torch.Tensor, counts: list[int], names: tuple[str, ...], *, training: bool) -> Steps:
    fastest = [(n, _fastest(site, x[:n], names, training=training)) for n in counts]
    steps: list[tuple[int, str]] = [(0, fastest[0][1])]
    for (before, old), (after, new) in pairwise(fastest):
        if old != new:
            steps.append((max(before + 1, round((before * after) ** 0.5)), new))
    return tuple(steps)


def _fastest(site: Adapter, x: torch.Tensor, names: tuple[str, ...], *, training: bool) -> str:
    """The lowering with the least median time, the contenders taking turns."""
    runs = {name: _run(site, x, name, training=training) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode(False), torch.set_grad_enabled(training):
        for i in range(REPEATS + 1):
            for name, run in runs.items():
                started = now(x.device)
                run()
                if i:
                    times[name].append(now(x.device) - started)
    return min(names, key=lambda name: statistics.median(times[name]))


def _run(site: Adapter, x: torch.Tensor, name: str, *, training: bool) -> Callable[[], None]:
    x = x.clone().requires_grad_(training)  # a clone: a tensor of inference mode could not be trained on
    owner = site.host.owner
    bare: type[nn.Module] = without(type(owner), Called)
    cores = list(site.core.parameters())

    def run() -> None:
        y = REGISTRY[name].run(site, x, lambda: bare.forward(owner, x))
        if training:
            torch.autograd.grad(y, [x, *cores], y.detach(), allow_unused=True)

    return run


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
