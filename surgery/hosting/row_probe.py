"""Which entries of a site's input belong to which row of the batch, measured on the base: what moves is its.

The model runs on rows that are unlike, and again with one row changed at a time. Divisibility would not do: of a
sequence-first input with as many tokens as rows, or of tokens that were routed, nothing in the sizes tells whose they
are. An entry counts as moved where it changes by more than rounding: experts are given other numbers of tokens then,
and round the tokens of other rows in another way. Where a row moves nothing by so much, whatever it moves counts.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from passes.errors import InputError
from passes.infra.tolerance import RELATIVE
from passes.ir.forward_context import Call, copied, inference_mode_of, state_kept
from surgery.hosting.row_inputs import Trial, TrialMaker
from surgery.modules.coefficients import RowLayout
from surgery.modules.steering import Steering

Layouts = frozenset[RowLayout]
Seen = dict[nn.Module, list[torch.Tensor]]  # what each adapter was given in a run, projected on a few directions
See = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Run = Callable[[Call, See], None]
KINDS: tuple[Literal["entries", "blocks", "cycles"], ...] = ("entries", "blocks", "cycles")
DIRECTIONS = 4
TRIALS, MOST_TRIALS = 2, 8
ROUNDING = 10  # times what the same operations in another order may differ by
ROUTED = (
    "its input changes in size with the contents of a row, as where tokens are routed or packed, so that coeff by row "
    "cannot follow them"
)
MIXED = "its input mixes the rows of the batch, so that no coeff by row is that of one of them alone"
UNMOVED = "its input does not depend on what a row of the batch holds, so that it has no coeff by row"
IRREGULAR = "the entries of a row lie neither along one dimension of its input, nor in blocks or cycles of one"
UNLIKE = "its input holds the rows in another place from call to call"


class DoesNotRunError(InputError):
    """A model does not run with other contents in its rows."""


def measure_rows(
    model: nn.Module, steering: Steering, call: Call, dim: int, run: Run
) -> dict[nn.Module, Layouts | str]:
    """Where the rows lie in the input of each adapter that a call reaches; or a sentence that says why that is unknown.

    Args:
        dim: the dimension of the model's inputs that the rows lie along.
        run: calls the model, and tells what each adapter is given.

    Raises:
        DoesNotRunError: the model does not run with other contents.
    """
    failed: Exception | None = None
    with state_kept(model), inference_mode_of(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        _mute(model)
        for trial in TrialMaker(model, call, dim).ways():
            found: list[dict[nn.Module, Layouts | str]] = []
            layouts: dict[nn.Module, Layouts | str] = {}
            try:
                # what no row moved may have been dead by chance, as after ReLU
                while len(found) < TRIALS or (UNMOVED in layouts.values() and len(found) < MOST_TRIALS):
                    found.append(_measured(trial(len(found)), run, steering))
                    layouts = _of_trials(found)
            except Exception as error:  # a model may resist other sizes and contents in any way
                failed = error
                continue
            return layouts
    reason = (str(failed).strip().splitlines() or [""])[0][:300]
    raise DoesNotRunError(
        f"which entries belong to which row of {type(model).__name__} cannot be measured, since it does not run with "
        f"other contents in a row: {type(failed).__name__}: {reason}; use a scalar coeff"
    ) from failed


def _mute(model: nn.Module) -> None:
    """Let no hook of the user's see the runs, within a block that keeps the state: those that gather shards go on."""
    for module in model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(module)[name]
            if hooks:
                vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_of_a_library(hook))


def _is_of_a_library(hook: object) -> bool:
    origin = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return origin.startswith(("torch.", "accelerate.", "deepspeed."))


def _measured(trial: Trial, run: Run, steering: Steering) -> dict[nn.Module, Layouts | str]:
    base = _observed(trial.call, run, steering)
    changed = {row: _observed(call, run, steering) for row, call in trial.changed.items()}
    sites = dict.fromkeys([*base, *(site for seen in changed.values() for site in seen)])
    found = {
        site: _layouts(base.get(site, []), {row: seen.get(site, []) for row, seen in changed.items()}, trial.batch)
        for site in sites
    }
    return found | _followed(trial, base, found, run, steering)


def _followed(
    trial: Trial, base: Seen, found: Mapping[nn.Module, Layouts | str], run: Run, steering: Steering
) -> dict[nn.Module, Layouts | str]:
    """The layouts of sites whose inputs are alike in all rows, as of a time step, by what follows from their outputs.

    Where one dimension is as long as the batch, what is added to one of its entries has to move that row of the sites
    whose rows are known, and no other.
    """
    dims: dict[nn.Module, int] = {}
    for site in (site for site, one in found.items() if one == UNMOVED):
        fit = [{d for d, size in enumerate(x.shape[:-1]) if size == trial.batch} for x in base[site]]
        if len(common := set.intersection(*fit)) == 1:
            dims[site] = common.pop()
    if not dims:
        return {}
    known = {site: one for site, one in found.items() if not isinstance(one, str)}
    for row in trial.changed:
        seen = _observed(trial.call, run, steering, {site: (dim, row) for site, dim in dims.items()})
        moved = []
        for site, layouts in known.items():
            if [x.shape for x in seen.get(site, [])] != [x.shape for x in base[site]]:
                return {}
            masks = [mask for x, y in zip(base[site], seen[site], strict=True) if bool((mask := _moved(x, y)).any())]
            moved += [any(_are_of(mask, layout, row, trial.batch) for layout in layouts) for mask in masks]
        if not moved or not all(moved):
            return {}
    return {site: frozenset(RowLayout(dim, kind) for kind in KINDS) for site, dim in dims.items()}


def _observed(
    call: Call, run: Run, steering: Steering, added: Mapping[nn.Module, tuple[int, int]] | None = None
) -> Seen:
    """What each adapter is given in one run of the base.

    Args:
        added: adapters that add noise to one entry of a dimension, with both.
    """
    seen: Seen = {}
    directions: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    def see(site: nn.Module, x: torch.Tensor) -> torch.Tensor:
        d = torch.zeros_like(x)
        if threading.get_ident() != steering.caller:
            return d  # a call of another thread
        wide = torch.promote_types(x.dtype, torch.float32)
        key = x.shape[-1], x.device, wide
        if key not in directions:
            made = torch.randn(key[0], DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            directions[key] = made.to(x.device, wide)
        seen.setdefault(site, []).append((x.to(wide) @ directions[key]).to(x.dtype))
        if added and site in added:
            part = d.select(*added[site])
            noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            part.copy_(noise * (float(x.abs().mean()) or 1.0))
        return d

    torch.manual_seed(0)
    random.seed(0)
    with _probing(steering, see):
        run(copied(call), see)
    return seen


@contextmanager
def _probing(steering: Steering, see: See) -> Iterator[None]:
    """Let adapters be the base's, and tell what they are given."""
    before = dict(steering._buffers)
    was = {name: vars(steering)[name] for name in ("armed", "caller", "probe")}
    steering._buffers.update(
        coeff=torch.zeros(1, dtype=steering.coeff.dtype, device=steering.coeff.device), second=None
    )
    vars(steering).update(armed=True, caller=threading.get_ident(), probe=see)
    try:
        steering.refresh_copies()
        yield
    finally:
        steering._buffers.update(before)
        vars(steering).update(was)
        steering.refresh_copies()


def _layouts(base: Sequence[torch.Tensor], changed: Mapping[int, Sequence[torch.Tensor]], batch: int) -> Layouts | str:
    """The layouts that agree with what moved at one site, call by call."""
    shapes = [x.shape for x in base]
    if any([x.shape for x in seen] != shapes for seen in changed.values()):
        return ROUTED
    calls = [_of_call(x, {row: seen[i] for row, seen in changed.items()}, batch) for i, x in enumerate(base)]
    return _joined(calls)


def _of_call(x: torch.Tensor, changed: Mapping[int, torch.Tensor], batch: int) -> Layouts | str:
    masks = {row: _moved(x, other) for row, other in changed.items()}
    moved = {row: mask for row, mask in masks.items() if bool(mask.any())}  # a row may be dead: before ReLU, say
    if not moved:
        return UNMOVED
    if bool((torch.stack(list(moved.values())).sum(0) > 1).any()):
        return MIXED
    found = {
        layout
        for dim, size in enumerate(x.shape[:-1])
        for layout in (
            RowLayout(dim, kind) for kind in KINDS if size % batch == 0 and (size == batch or kind != "entries")
        )
        if all(_are_of(mask, layout, row, batch) for row, mask in moved.items())
    }
    return frozenset(found) or IRREGULAR


def _of_trials(found: Sequence[Mapping[nn.Module, Layouts | str]]) -> dict[nn.Module, Layouts | str]:
    """The layouts of each site that agree with all trials in which a row moved anything there."""
    sites = dict.fromkeys(site for one in found for site in one)
    seen = {site: [one[site] for one in found if site in one] for site in sites}
    return {site: _joined([one for one in of_site if one != UNMOVED] or [UNMOVED]) for site, of_site in seen.items()}


def _are_of(mask: torch.Tensor, layout: RowLayout, row: int, batch: int) -> bool:
    """Whether all marked entries are those of a row."""
    size = mask.shape[layout.dim]
    index = mask.movedim(layout.dim, 0).reshape(size, -1).any(1).nonzero().flatten()
    return bool((index % batch == row).all() if layout.kind == "cycles" else (index // (size // batch) == row).all())


def _moved(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which entries of an input (..., d) changed, (...): by more than rounding, or at all where none did by so much."""
    limit = min(ROUNDING * RELATIVE[x.dtype], 0.1)
    one, two = x.to(torch.float64), other.to(torch.float64)
    size = torch.maximum(one.abs().amax(-1), two.abs().amax(-1))
    change = (one - two).abs().amax(-1)
    found = (change > limit * size) | (change.isnan() & ~(one.isnan() & two.isnan()).all(-1))
    return found if bool(found.any()) else change > 0


def _joined(found: Sequence[Layouts | str]) -> Layouts | str:
    """The layouts that agree with all of them, or the first reason why there are none."""
    layouts: list[Layouts] = []
    for one in found:
        if isinstance(one, str):
            return one
        layouts.append(one)
    return frozenset.intersection(*layouts) or UNLIKE


def join(one: Layouts | str, other: Layouts | str) -> Layouts | str:
    """What two measurements of one site agree on."""
    return _joined([one, other])


def chosen(layouts: Layouts | str) -> RowLayout | str:
    """The one layout that all measurements agree with."""
    if isinstance(layouts, str):
        return layouts
    exact = [layout for layout in layouts if layout.kind == "entries"] or list(layouts)
    return exact[0] if len(exact) == 1 else IRREGULAR
