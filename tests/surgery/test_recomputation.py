"""A forward that is recomputed in backward is the same forward: its coefficient, its factors, its core."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import disable_adapter, get_coeff, set_coeff, set_scale, sites, steer
from surgery.modules.setting import Graph, Setting
from tests.support.checkpointed_models import (
    BATCH,
    COEFFICIENTS,
    KINDS,
    LOWERINGS,
    apart,
    checkpointed,
    expected,
    gradients,
    inputs,
    loss_of,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_coefficient = pytest.mark.parametrize("coefficient", COEFFICIENTS)
CLOSE = 1e-12  # of sums in float64


def whole(coefficients: list[Any]) -> list[list[Any]]:
    """One coefficient for all three blocks."""
    return [[coeff] * 3 for coeff in coefficients]


def after(model: nn.Module, x: Tensor, coefficients: list[Any]) -> None:
    outputs = []
    for coeff in coefficients:
        with steer(model, coeff):
            outputs.append(model(x))
    loss_of(outputs).backward()


def within_another(model: nn.Module, x: Tensor, coefficients: list[Any]) -> None:
    outputs = []
    for coeff in coefficients:
        with steer(model, 0.1), steer(model, coeff):
            outputs.append(model(x))
    with steer(model, -3.0), steer(model, torch.full((BATCH,), 3.0)):
        loss_of(outputs).backward()


def set_and_restored(model: nn.Module, x: Tensor, coefficients: list[Any]) -> None:
    outputs = []
    for coeff in coefficients:
        set_coeff(model, coeff)
        outputs.append(model(x))
        set_coeff(model, 5.0)
    set_coeff(model, coefficients[0])
    loss_of(outputs).backward()


def changed_between_backwards(model: nn.Module, x: Tensor, coefficients: list[Any]) -> None:
    losses = []
    for i, coeff in enumerate(coefficients):
        with steer(model, coeff):
            losses.append((i + 1) * (model(x) ** 3).sum())
    for loss in losses:
        with steer(model, 9.0):
            loss.backward(retain_graph=True)
            model(x)
    x.grad = None
    model.zero_grad()
    for loss in reversed(losses):
        loss.backward()


WHEN: dict[str, Callable[[nn.Module, Tensor, list[Any]], None]] = {
    "after": after,
    "within another": within_another,
    "set and restored": set_and_restored,
    "changed between backwards": changed_between_backwards,
}


# selective checkpointing allows no second backward
ALL = [(kind, when) for kind in KINDS for when in WHEN if (kind, when) != ("selective", "changed between backwards")]


@each_coefficient
@pytest.mark.parametrize(("kind", "when"), ALL)
def test_a_recomputed_forward_has_the_coefficient_of_its_own(kind: str, coefficient: str, when: str) -> None:
    model, x, coefficients = checkpointed(kind), inputs(), COEFFICIENTS[coefficient]
    WHEN[when](model, x, coefficients)
    assert apart(gradients(model, x), expected(model, whole(coefficients))) < CLOSE


@pytest.mark.matrix
@each_kind
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_in_every_lowering(kind: str, lowering: str, mode: str) -> None:
    model, x, coefficients = checkpointed(kind, lowering).train(mode == "train"), inputs(), COEFFICIENTS["mixed"]
    after(model, x, coefficients)
    assert apart(gradients(model, x), expected(model, whole(coefficients))) < CLOSE


def outer(model: Any, run: Any, x: Tensor) -> Tensor:
    """The last block of the function runs with what was in force outside of it."""

    def function(y: Tensor) -> Tensor:
        y = model.layers[0](y)
        with steer(model, -1.0):
            y = model.layers[1](y)
        return model.layers[2](y)  # type: ignore[no-any-return]

    return run(function, x)  # type: ignore[no-any-return]


def last(model: Any, run: Any, x: Tensor) -> Tensor:
    """The last blocks run with what the function sets."""

    def function(y: Tensor) -> Tensor:
        y = model.layers[0](y)
        with steer(model, -1.0):
            return model.layers[2](model.layers[1](y))  # type: ignore[no-any-return]

    return run(function, x)  # type: ignore[no-any-return]


def around_another(model: Any, run: Any, x: Tensor) -> Tensor:
    """What the function sets is in force in a checkpoint within it."""

    def function(y: Tensor) -> Tensor:
        y = model.layers[0](y)
        with steer(model, -1.0):
            y = run(model.layers[1], y)
        return model.layers[2](y)  # type: ignore[no-any-return]

    return run(function, x)  # type: ignore[no-any-return]


@pytest.mark.matrix
@each_kind
@each_coefficient
@pytest.mark.parametrize(("shape", "inner"), [(outer, (1,)), (last, (1, 2)), (around_another, (1,))])
def test_a_checkpointed_function_may_steer_within_itself(kind: str, coefficient: str, shape: Any, inner: Any) -> None:
    model, x, run = checkpointed(None), inputs(), KINDS[kind]
    coefficients = [c for c in COEFFICIENTS[coefficient] if not isinstance(c, Tensor) or c.dim() < 2]
    coefficients = coefficients or [torch.linspace(-1, 1, BATCH)]  # tokens belong to calls of the root
    with torch.no_grad(), steer(model, torch.linspace(-1, 1, BATCH)):
        model(x)  # where rows lie is measured in a call of the whole model
    outputs = []
    for coeff in coefficients:
        with steer(model, coeff):
            outputs.append(shape(model, run, x))
    loss_of(outputs).backward()
    known = [[-1.0 if i in inner else coeff for i in range(3)] for coeff in coefficients]
    assert apart(gradients(model, x), expected(model, known)) < CLOSE
    assert get_coeff(model) == 1.0


@each_kind
@each_coefficient
def test_the_whole_root_may_be_checkpointed(kind: str, coefficient: str) -> None:
    model, x, coefficients = checkpointed(None), inputs(), COEFFICIENTS[coefficient]
    outputs = []
    for coeff in coefficients:
        with steer(model, coeff):
            outputs.append(KINDS[kind](lambda y: model(y), x))
    loss_of(outputs).backward()
    assert apart(gradients(model, x), expected(model, whole(coefficients))) < CLOSE


@each_kind
def test_factors_of_sites_and_disabling_are_recomputed_too(kind: str) -> None:
    model, x = checkpointed(kind), inputs()
    outputs = [model(x)]
    set_scale(model, {"up": 0.5, "down": 0.5})
    outputs.append(model(x))
    with disable_adapter(model):
        outputs.append(model(x))
    set_scale(model, {"up": -2.0, "down": -2.0})
    outputs.append(model(x))
    set_scale(model, {"up": 7.0})
    loss_of(outputs).backward()
    assert apart(gradients(model, x), expected(model, whole([1.0, 0.5, 0.0, -2.0]))) < CLOSE


def write(model: nn.Module) -> None:
    with torch.no_grad():
        sites(model)["layers.1.up"].core.g.mul_(2.0)


def replace(model: nn.Module) -> None:
    core = sites(model)["layers.1.up"].core
    core.g = nn.Parameter(core.g.detach() * 2.0)


def step(model: nn.Module, **options: Any) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1, **options)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "write": write,
    "replace": replace,
    "step": step,
    "fused": lambda model: step(model, fused=True),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_a_core_that_was_written_to_in_between_is_an_error(kind: str, change: str) -> None:
    model, x = checkpointed(kind), inputs()
    loss = (model(x) ** 2).sum()
    CHANGES[change](model)
    with pytest.raises(surgery.SurgeryError, match=r"site 'layers\.\d\.(up|down)': its core was written to"):
        loss.backward()
    (model(x) ** 2).sum().backward()  # the next forward is fine


def stepping(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return hook


@each_kind
def test_optimisers_of_others_and_within_backward_are_no_matter(kind: str) -> None:
    found: dict[str | None, list[Tensor]] = {}
    for way in (None, kind):
        model, x, other = checkpointed(way), inputs(), nn.Parameter(torch.ones(3))
        for site in sites(model).values():
            optimizer = torch.optim.SGD([site.core.g], lr=0.01)
            site.core.g.register_post_accumulate_grad_hook(stepping(optimizer))
        other.grad = torch.ones(3)
        for coeff in (1.0, -1.0, 0.5):
            with steer(model, coeff):
                loss = (model(x) ** 2).sum()
            torch.optim.Adam([other], fused=True).step()
            loss.backward()
        found[way] = [x.grad, *(site.core.g.detach() for site in sites(model).values())]  # type: ignore[list-item]
    assert apart(found[kind], found[None]) < CLOSE


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def forward_elsewhere(model: nn.Module, x: Tensor) -> list[Tensor]:
    with steer(model, 2.0):
        outputs = [model(x)]
    with steer(model, 0.5):
        outputs.append(in_a_thread(lambda: model(x)))
    return outputs


def all_elsewhere(model: nn.Module, x: Tensor) -> list[Tensor]:
    def steered() -> Tensor:
        with steer(model, 2.0):
            return model(x)  # type: ignore[no-any-return]

    outputs = [in_a_thread(steered)]
    with steer(model, 0.5):
        return [*outputs, model(x)]


@each_kind
@pytest.mark.parametrize("forwards", [forward_elsewhere, all_elsewhere])
@pytest.mark.parametrize("backward_elsewhere", [False, True])
def test_several_threads_are_right_or_refused(kind: str, forwards: Any, backward_elsewhere: bool) -> None:
    model, x = checkpointed(kind), inputs()
    loss = loss_of(forwards(model, x))
    try:
        if backward_elsewhere:
            in_a_thread(loss.backward)
        else:
            loss.backward()
    except surgery.SurgeryError as found:
        error = str(found)
    else:
        error = ""
    right = not error and apart(gradients(model, x), expected(model, whole([2.0, 0.5]))) < CLOSE
    assert right or "threads ran this model with different coefficients" in error


@each_kind
def test_a_backward_in_another_thread_is_right(kind: str) -> None:
    model, x = checkpointed(kind), inputs()
    in_a_thread(lambda: model(x))  # that thread recorded something once
    with steer(model, 2.0):
        outputs = [model(x)]
    with steer(model, 0.5):
        outputs.append(model(x))
    in_a_thread(loss_of(outputs).backward)
    assert apart(gradients(model, x), expected(model, whole([2.0, 0.5]))) < CLOSE


@each_kind
def test_a_part_that_is_called_by_itself(kind: str) -> None:
    model, x = checkpointed(None), inputs()
    with torch.no_grad(), steer(model, torch.linspace(-1, 1, BATCH)):
        model(x)  # where rows lie is measured in a call of the whole model
    outputs = []
    for coeff in (0.7, torch.tensor([0.5, -1.0, 2.0, 0.0]), -1.0):
        y = x
        with steer(model, coeff):
            for layer in model.layers:
                y = KINDS[kind](layer, y)
        outputs.append(y)
    loss_of(outputs).backward()
    known = expected(model, whole([0.7, torch.tensor([0.5, -1.0, 2.0, 0.0]), -1.0]))
    assert apart(gradients(model, x), known) < CLOSE


def test_a_forward_that_failed_and_a_backward_that_failed_leave_nothing_behind() -> None:
    model, x = checkpointed("reentrant in reentrant"), inputs()
    with steer(model, 2.0):
        loss = (model(x) ** 3).sum()
    handle = model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    handle.remove()
    with steer(model, 0.5), pytest.raises(RuntimeError):
        model(torch.ones(1, 2, 3, dtype=torch.float64))
    x.grad = None
    model.zero_grad()
    with steer(model, 2.0):
        loss = (model(x) ** 3).sum()
    loss.backward()
    assert apart(gradients(model, x), expected(model, whole([2.0]))) < CLOSE


def test_within_backward_only_a_block_may_set_the_coefficient() -> None:
    model, x = checkpointed(None), inputs()

    def sets(y: Tensor) -> Tensor:
        set_coeff(model, 0.5)
        return model(y)  # type: ignore[no-any-return]

    y = checkpoint(sets, x, use_reentrant=False)
    with pytest.raises(surgery.SurgeryError, match=r"set_coeff within backward\(\)"):
        y.sum().backward()
    assert get_coeff(model) == 0.5


def test_what_is_remembered_does_not_grow() -> None:
    model, x = checkpointed("non-reentrant"), inputs()
    steering = next(iter(sites(model).values())).steering
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            optimizer.zero_grad()
            after(model, x, COEFFICIENTS["mixed"])
            optimizer.step()
        gc.collect()
        assert steering.log is not None
        return len(steering.log.lanes[0].entries), sum(isinstance(o, (Setting, Graph)) for o in gc.get_objects())

    train(10)
    assert train(10) == train(10)


def test_a_graph_that_is_left_keeps_its_coefficient() -> None:
    model, x = checkpointed("non-reentrant"), inputs()
    with steer(model, -1.0):
        loss = (model(x) ** 3).sum()
    for i in range(40):
        with steer(model, 0.1 + 0.01 * i):
            model(x).sum().backward()
    x.grad = None
    model.zero_grad()
    loss.backward()
    assert apart(gradients(model, x), expected(model, whole([-1.0]))) < CLOSE


def test_a_forward_that_is_no_longer_known_is_refused() -> None:
    model, x, seen = checkpointed("non-reentrant"), inputs(), []
    with steer(model, -1.0), model.layers[1].register_forward_hook(lambda *found: seen.append(found[-1])):
        model(x)  # its output is dropped: nothing tells that a graph is left
    for i in range(40):
        with steer(model, 0.1 + 0.01 * i):
            model(x).sum().backward()
    with pytest.raises(surgery.SurgeryError, match="not known any more"):
        seen[0].sum().backward()


@pytest.mark.parametrize("lowering", ["auto", "dense", "lowrank"])
def test_in_training_the_lowering_does_not_depend_on_gradients(lowering: str) -> None:
    model = checkpointed(None, lowering, torch.float32).train()
    for site in sites(model).values():
        for tokens in (1, 64, 4096):
            x = torch.zeros(tokens, site.features[0])
            with torch.no_grad():
                name = site.chosen(x)
            assert site.chosen(x) == name
    x = inputs(torch.float32)
    y = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_inference_remembers_nothing() -> None:
    model, x = checkpointed(None).eval(), inputs()
    steering = next(iter(sites(model).values())).steering
    with torch.no_grad():
        address = steering.coeff.data_ptr()
        for coeff in (0.5, -1.0):
            with steer(model, coeff):
                model(x)
    assert steering.log is None
    assert steering.coeff.data_ptr() == address
