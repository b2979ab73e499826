"""Whether an exported program agrees with PyTorch: every output, at several coefficients, and at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from exporters.shared.outputs import valid_positions
from exporters.shared.subject import Subject, leaves
from passes.infra.tolerance import RELATIVE, disagreement, relative_error
from passes.ir.forward_context import Call, copied
from passes.ir.torch_internals import tree_leaves, tree_map_only
from surgery.errors import ExportError
from surgery.verbs.steer import set_coeff

Run = Callable[..., object]


def compare_program(subject: Subject, run: Run, steer: Callable[[float], object], what: str) -> float:
    """Compare all outputs with PyTorch by the table of tolerances, and set the coefficient back to 1.

    Args:
        run: the program.
        steer: sets its coefficient.
        what: names the program in the message.

    Returns:
        The largest deviation, relative to the largest entry of its output.

    Raises:
        ExportError: they differ.
    """
    worst = 0.0
    for coeff in (*subject.coeffs[1:], subject.coeffs[0]):
        if coeff is not None:
            set_coeff(subject.reference, coeff)
            steer(coeff)
        error, problem = differ(subject, run, subject.call)
        if problem is not None:
            at = "" if coeff is None else f" at coeff={coeff}"
            raise ExportError(f"{what} differs from PyTorch{at}: {problem}")
        worst = max(worst, error)
    return worst


def sizes(subject: Subject, run: Run, names: Collection[str] = ("batch", "sequence")) -> dict[str, str]:
    """What becomes of the batch and the sequence at another size: "free", "fixed" (refused), or "wrong".

    Only what the model itself takes is listed.
    """
    found = {}
    for name, call in other_calls(subject.call).items():
        if name not in names:
            continue
        try:
            expected = subject.expected(call)
        except (RuntimeError, ValueError, IndexError, AssertionError):  # the model has no such size to be kept free
            continue
        args, kwargs = copied(call)
        try:
            with torch.no_grad():
                outputs = run(*args, **kwargs)
        except Exception:  # runtimes raise types of their own; a refusal is an answer
            found[name] = "fixed"
        else:
            found[name] = "free" if _differ(subject, outputs, expected, call)[1] is None else "wrong"
    return found


def refuse_wrong(found: dict[str, str], what: str) -> dict[str, str]:
    """Pass sizes on where none is wrong.

    Raises:
        ExportError: one is.
    """
    if wrong := [name for name, size in found.items() if size == "wrong"]:
        raise ExportError(f"{what} differs from PyTorch at another size of the {wrong[0]}")
    return found


def other_calls(call: Call) -> dict[str, Call]:
    """The call with twice the rows, and with a shorter second dimension."""
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    calls: dict[str, Call] = {}
    if len({len(tensor) for tensor in tensors}) == 1:
        calls["batch"] = tree_map_only(torch.Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, call)
    if any(tensor.dim() > 1 for tensor in tensors) and all(t.shape[1] > 2 for t in tensors if t.dim() > 1):
        calls["sequence"] = tree_map_only(torch.Tensor, lambda t: t[:, :-1].clone() if t.dim() > 1 else t, call)
    return calls


def differ(subject: Subject, run: Run, call: Call) -> tuple[float, str | None]:
    """Run a program and compare all outputs: the largest deviation, and what is wrong or None."""
    args, kwargs = copied(call)
    expected = subject.expected(call)
    with torch.no_grad():
        return _differ(subject, run(*args, **kwargs), expected, call)


def _differ(subject: Subject, outputs: object, expected: list[torch.Tensor], call: Call) -> tuple[float, str | None]:
    found, kwargs = leaves(outputs), call[1]
    if len(found) != len(expected):
        return float("inf"), f"it has {len(found)} outputs, the model {len(expected)}"
    coarsest = _coarsest(subject)
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf"), f"{one.dtype} {tuple(one.shape)}, expected {other.dtype} {tuple(other.shape)}"
        one, other = valid_positions(one, kwargs), valid_positions(other, kwargs)
        problem = disagreement(one, other, coarsest if one.dtype in RELATIVE else None)
        if problem is not None:
            return float("inf"), problem
        worst = max(worst, relative_error(one, other))
    return worst, None


def _coarsest(subject: Subject) -> torch.dtype | None:
    """The coarsest dtype that the model computes in: a float32 output may come from bfloat16 weights."""
    tensors = [*subject.reference.parameters(), *tree_leaves(subject.call)]
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.dtype in RELATIVE}
    return max(dtypes, key=RELATIVE.__getitem__, default=None)
