"""The coefficient: set it, for all, by row or by token; within a block; a lasting factor for single sites."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from passes.capture.capture import default_inputs, forward_call, hub_inputs
from passes.errors import InputError
from surgery.errors import TargetError
from surgery.hosting.coefficient import DECODER, ENCODER, ROWS, Coefficient, Rows
from surgery.hosting.root import roots_of
from surgery.hosting.state import State, adapters_of, record_of, sites_of, unwrap
from surgery.hosting.steering_guard import check_steering, steering
from surgery.modules.adapter import Adapter
from surgery.planning.target_selection import matches
from surgery.verbs.streams import follow_sequences

Model = TypeVar("Model", bound=nn.Module)
Number = float | torch.Tensor
Tokens = Mapping[str, torch.Tensor]


def sites(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the keys of their sites; empty for a plain model."""
    return adapters_of(unwrap(model))


def set_coeff(
    model: Model,
    coeff: Number | None = None,
    *,
    rows: Rows | None = None,
    tokens: Tokens | None = None,
    beyond: float | None = None,
) -> Model:
    """Set the steering coefficient of every site, by one write; values never recompile a compiled model.

    Args:
        model: a root, or a module that contains roots: then all of them are set.
        coeff: the number of dimensions is the kind. A finite number for all; (batch,) for the rows of a batch;
            (batch, columns) for the tokens of the model's main input, padded as it is given. A size of 1 broadcasts.
        rows: "exact" (the batch is the number of rows), "repeat" (it is k times that, and row i serves k neighbours, as
            beams are), "tile" (k times over, as for guidance). By default "exact", and "repeat" inside of ``generate``.
        tokens: of a model with two sequences, coefficients (batch, columns) by the names of its two inputs.
        beyond: the coefficient of tokens after the last column; without it, such a call is an error.

    Raises:
        InputError: coeff is not finite, has more than two dimensions, or differs between rows where a site is hosted as
            a weight.
        SurgeryError: the model carries no surgery, is a part of a root, or another thread steers it.
    """
    for root in (roots := roots_of(model)):
        check_steering(record_of(root).steering)
    values = [_checked(root, coeff, rows, tokens, beyond) for root in roots]
    before = [present(record_of(root)) for root in roots]
    try:
        for root, value in zip(roots, values, strict=True):
            write_coefficient(record_of(root), value)
    except BaseException:
        for root, value in zip(roots, before, strict=True):
            write_coefficient(record_of(root), value)
        raise
    return model


def get_coeff(model: nn.Module) -> float | torch.Tensor | dict[str, torch.Tensor]:
    """The coefficient that is set: a number, a tensor (batch,) or (batch, columns), or tensors by input name.

    Raises:
        InputError: the model contains roots with different coefficients.
        SurgeryError: the model carries no surgery.
    """
    found = [_shown(record_of(root)) for root in roots_of(model)]
    if any(not _same(found[0], other) for other in found[1:]):
        raise InputError(f"the {len(found)} operated models within have different coefficients: ask each of them")
    return found[0]


@contextlib.contextmanager
def steer(
    model: Model,
    coeff: Number | None = None,
    *,
    rows: Rows | None = None,
    tokens: Tokens | None = None,
    beyond: float | None = None,
) -> Iterator[Model]:
    """Set the coefficient within a ``with`` block, and put back what there was; the arguments are :func:`set_coeff`'s.

    Raises:
        SurgeryError: another thread or task is within such a block; blocks of one may be nested.
    """
    states = [record_of(root) for root in roots_of(model)]
    with steering([state.steering for state in states]):
        before = [present(state) for state in states]
        try:
            yield set_coeff(model, coeff, rows=rows, tokens=tokens, beyond=beyond)
        finally:
            try:
                _put_back(states, before)
            except BaseException:  # an interrupt; what was begun is to be ended all the same
                _put_back(states, before)
                raise


@contextlib.contextmanager
def disable_adapter(model: Model) -> Iterator[Model]:
    """Run the base within a ``with`` block: PEFT's word for coefficient 0."""
    with steer(model, 0.0):
        yield model


def set_scale(model: Model, scales: Mapping[str, float]) -> Model:
    """Set a lasting factor of the coefficient at single sites; it is saved with the core.

    It multiplies the coefficient before any clamp of the variant. Sites that no pattern matches keep theirs.

    Args:
        scales: finite numbers by pattern: name suffixes, or regular expressions for whole keys, as in ``rank_pattern``.

    Raises:
        TargetError: a pattern matches no site.
        InputError: a factor is not a finite number, or a site stands in a graph, whose constants are fixed.
    """
    for root in roots_of(model):
        found = adapters_of(root)
        changes: dict[str, float] = {}
        for pattern, scale in scales.items():
            number = _finite(scale)
            keys = [key for key in found if matches([pattern], key) or matches(pattern, key)]
            if not keys:
                raise TargetError(f"set_scale: {pattern!r} matches no site (there are {', '.join(list(found)[:5])} …)")
            changes |= dict.fromkeys(keys, number)
        if fixed := [key for key in changes if found[key].host.inlined]:
            raise InputError(f"site {fixed[0]!r} stands in a graph: set the scale before to_graph")
        for key, number in changes.items():
            write_scale(found[key], number)
        record_of(root).staleness.forget()
    return model


def write_scale(site: Adapter, scale: float) -> None:
    """Set the lasting factor of one site."""
    core = site.core
    with torch.inference_mode(False), torch.no_grad():
        if core.scale is None:
            core.scale = torch.tensor(scale, dtype=core.dtype, device=site.device)
        else:
            core.scale.fill_(scale)


def get_scale(model: nn.Module) -> dict[str, float]:
    """The lasting factor of every site by its key; 1.0 where none was set."""
    return {k: 1.0 if s.core.scale is None else float(s.core.scale) for k, s in sites(model).items()}


def _checked(
    root: nn.Module, coeff: Number | None, rows: Rows | None, tokens: Tokens | None, beyond: float | None
) -> torch.Tensor | Coefficient:
    """What is to be set, fit for the sites of a root."""
    found = sites_of(root, record_of(root))
    value, second = _coefficient(coeff, tokens, root)
    if rows is not None and rows not in ROWS:
        raise InputError(f"rows must be one of {', '.join(map(repr, ROWS))}, found {rows!r:.80}")
    if beyond is not None:
        beyond = _finite(beyond)
        if value.dim() != 2:
            raise InputError("beyond= is for coefficients by token, (batch, columns)")
    if fixed := [key for key, site in found.items() if site.coeff_is_folded]:
        raise InputError(f"site {fixed[0]!r}: coeff was folded into a constant, so it cannot be set any more")
    if value.dim() == 0:
        return value
    weights = [key for key, site in found.items() if site.host.changes_weight]
    if weights:
        kind = "rows" if value.dim() == 1 else "tokens"
        raise InputError(
            f"site {weights[0]!r} is read as a weight, which cannot differ between the {kind} of a batch; "
            "use a scalar coeff, or leave such sites out with exclude_modules"
        )
    if value.dim() == 2:
        if inlined := [key for key, site in found.items() if site.host.inlined]:
            raise InputError(
                f"site {inlined[0]!r} stands in a graph, which does not know the position of a token; steer the model "
                "that the graph was made from, or the rows of a batch with a tensor (batch,)"
            )
        follow_sequences(root, found, two=second is not None)
    if value.numel() > 1 and found:
        _measure_rows(root)
    return Coefficient(value, second, rows, beyond)


def _measure_rows(root: nn.Module) -> None:
    """Find out where the rows of a batch lie, if there are inputs to measure it with; else the next call does so."""
    state, inputs = record_of(root), default_inputs(root)
    if inputs is None:
        return
    call = ((), hub_inputs(root, forward_call(inputs)))
    state.rows.prepare(root, sites_of(root, state), state.steering, call)


def _coefficient(
    coeff: Number | None, tokens: Tokens | None, root: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The value along the main sequence, and along the other one."""
    if tokens is None:
        return _tensor(coeff), None
    if coeff is not None:
        raise InputError("give coeff or tokens=, not both")
    decoder = [name for name in tokens if name in DECODER]
    encoder = [name for name in tokens if name in ENCODER]
    if len(tokens) != 2 or len(decoder) != 1 or len(encoder) != 1:
        raise InputError(
            f"tokens= names the two inputs of a model, as input_ids and decoder_input_ids; found {list(tokens)}"
        )
    main, second = _tensor(tokens[decoder[0]]), _tensor(tokens[encoder[0]])
    if main.dim() != 2 or second.dim() != 2:
        raise InputError("tokens= takes tensors (batch, columns)")
    return main, second


def _tensor(coeff: object) -> torch.Tensor:
    try:
        # a Python number must not be rounded to float32 on its way to a float64 core
        value = coeff.detach() if isinstance(coeff, torch.Tensor) else torch.as_tensor(coeff, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"coeff must be a number or a tensor (batch,) or (batch, columns), found {coeff!r:.80}"
        ) from error
    if value.dim() > 2 or value.numel() == 0 or value.is_complex() or value.is_meta:
        raise InputError(f"coeff must be a real number or a tensor (batch,) or (batch, columns), found {coeff!r:.80}")
    if not torch.isfinite(value.float()).all():
        raise InputError(f"coeff must be finite in float32, found {value.tolist()}")
    return value.to(torch.float64)


def _finite(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < float("inf"):
        raise InputError(f"a factor must be a finite number, found {number!r:.80}")
    return float(number)


def present(state: State) -> torch.Tensor | Coefficient:
    """The coefficient that a root has."""
    return state.coefficient if state.coefficient is not None else torch.tensor(_shown(state), dtype=torch.float64)


def write_coefficient(state: State, value: torch.Tensor | Coefficient) -> None:
    """Write a coefficient where all adapters of a root read it."""
    if isinstance(value, Coefficient):
        state.steering.write(value.value, value.second)
        state.steering.rows, state.coefficient = value.rows or "exact", value
    else:
        state.steering.write(value)
        state.steering.rows, state.coefficient, state.number = "exact", None, float(value)


def _put_back(states: list[State], before: list[torch.Tensor | Coefficient]) -> None:
    for state, value in zip(states, before, strict=True):
        write_coefficient(state, value)


def _shown(state: State) -> float | torch.Tensor | dict[str, torch.Tensor]:
    found = state.coefficient
    if found is None:
        return state.number
    if found.second is None:
        return found.value.to(torch.float32)  # type: ignore[no-any-return]
    return {DECODER[0]: found.value.to(torch.float32), ENCODER[0]: found.second.to(torch.float32)}


def _same(one: object, other: object) -> bool:
    if isinstance(one, dict) or isinstance(other, dict):
        return isinstance(one, dict) and isinstance(other, dict) and all(torch.equal(one[n], other[n]) for n in one)
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))
