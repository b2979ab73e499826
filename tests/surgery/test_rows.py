"""Rows that have coefficients of their own: right wherever they lie in the inputs of sites, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from passes.infra.tolerance import disagreement
from surgery import get_coeff, set_coeff, sites, steer
from surgery.modules.coefficients import RowLayout
from tests.support.row_models import (
    LAYOUTS,
    REFUSED,
    WIDTH,
    AcrossRows,
    Conditioned,
    Flattened,
    Interleaved,
    Packed,
    Pair,
    Recurrent,
    SequenceFirst,
    one_by_one,
    operated,
    shaken,
)

each_layout = pytest.mark.parametrize("name", LAYOUTS)
ROWS = torch.tensor([0.0, -1.0, 1.5])


def inputs(batch: int, length: int, dim: int = 0) -> torch.Tensor:
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(10 * batch + length))
    return x.transpose(0, 1).contiguous() if dim else x


@each_layout
@pytest.mark.parametrize("length", [1, 3, 4, 7])
@torch.no_grad()
def test_every_row_is_that_of_its_own_coefficient(name: str, length: int) -> None:
    kind, dim, layout = LAYOUTS[name]
    model, x = operated(kind), inputs(3, length, dim)
    with steer(model, ROWS):
        found = model(x)
    assert disagreement(found, one_by_one(model, ROWS, lambda m: m(x.double()), dim)) is None
    assert {site.row_layout for site in sites(model).values()} == {RowLayout(*layout)}
    with steer(model, 0.0):
        assert torch.equal(found.select(dim, 0), model(x).select(dim, 0))


@each_layout
@pytest.mark.parametrize("variant", ["antipasto_rot", "antipasto_dplr", "lora_xs", "antipasto_ablate"])
@torch.no_grad()
def test_every_core_follows_the_rows(name: str, variant: str) -> None:
    kind, dim, _ = LAYOUTS[name]
    model, x = operated(kind, variant=variant), inputs(3, 3, dim)
    with steer(model, ROWS):
        together = model(x)
    for i, coeff in enumerate(ROWS.tolist()):
        with steer(model, coeff):
            assert disagreement(together.select(dim, i), model(x).select(dim, i)) is None


@each_layout
@pytest.mark.parametrize("lowering", ["lowrank", "output", "dense", "residual"])
@torch.no_grad()
def test_every_lowering_follows_the_rows(name: str, lowering: str) -> None:
    kind, dim, _ = LAYOUTS[name]
    model, x = operated(kind, lowering=lowering), inputs(3, 4, dim)
    with steer(model, ROWS):
        assert disagreement(model(x), one_by_one(model, ROWS, lambda m: m(x.double()), dim)) is None


@each_layout
def test_gradients_are_the_sum_of_those_of_the_rows(name: str) -> None:
    kind, dim, _ = LAYOUTS[name]
    model, x = operated(kind), inputs(3, 4, dim)

    def gradients() -> list[torch.Tensor]:
        found = [site.core.g.grad.clone() for site in sites(model).values()]
        model.zero_grad()
        return found

    with steer(model, ROWS):
        model(x).square().sum().backward()
    together = gradients()
    for i, coeff in enumerate(ROWS.tolist()):
        with steer(model, coeff):
            model(x).select(dim, i).square().sum().backward()
    for one, other in zip(together, gradients(), strict=True):
        assert disagreement(one, other) is None


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("length", [1, 4, 6])
@torch.no_grad()
def test_a_site_without_rows_of_its_own_is_named(name: str, length: int) -> None:
    kind, reason = REFUSED[name]
    model, x = operated(kind), inputs(3, length)
    with steer(model, 0.5):
        expected = model(x)
    with steer(model, ROWS), pytest.raises(surgery.SurgeryError, match=rf"site 'b'.*{reason}.*exclude_modules.*scalar"):
        model(x)
    with steer(model, ROWS), pytest.raises(surgery.SurgeryError, match="site 'b'"):
        model(x)  # it is not measured again, and refused all the same
    with steer(model, 0.5):
        assert torch.equal(model(x), expected)
    left_out = operated(kind, target_modules=["a"])
    with steer(left_out, ROWS):
        found = left_out(x)
    if kind is not AcrossRows:  # in which the rows of the base are not independent
        assert disagreement(found, one_by_one(left_out, ROWS, lambda m: m(x.double()))) is None


@torch.no_grad()
def test_packed_tokens_are_refused_also_where_all_rows_are_of_one_length() -> None:
    model, x = operated(Packed), inputs(3, 6)
    with steer(model, ROWS), pytest.raises(surgery.InputError, match=r"site 'a'.*exclude_modules"):
        model(x, torch.ones(3, 6, dtype=torch.bool))
    model = operated(Packed)
    with steer(model, ROWS):
        assert disagreement(model(x), one_by_one(model, ROWS, lambda m: m(x.double()))) is None


@pytest.mark.parametrize("length", [1, 3, 6])
@torch.no_grad()
def test_what_is_alike_in_all_rows_is_followed_to_where_it_goes(length: int) -> None:
    model, x = operated(Conditioned), inputs(3, length)
    with steer(model, ROWS):
        assert disagreement(model(x), one_by_one(model, ROWS, lambda m: m(x.double()))) is None
    assert sites(model)["b"].row_layout == RowLayout(0, "entries")


@torch.no_grad()
def test_rows_of_the_same_content_are_told_apart() -> None:
    model, x = operated(SequenceFirst), inputs(1, 3).expand(3, 3, WIDTH)
    with steer(model, ROWS):
        found = model(x)
    assert disagreement(found, one_by_one(model, ROWS, lambda m: m(x.double()))) is None


@torch.no_grad()
def test_two_values_on_four_rows_need_a_word() -> None:
    model, two, x = operated(SequenceFirst), torch.tensor([0.4, -0.8]), inputs(4, 4)
    with steer(model, two), pytest.raises(surgery.InputError, match=r"rows='repeat'.*rows='tile'"):
        model(x)
    for rows, spread in (("repeat", two.repeat_interleave(2)), ("tile", two.repeat(2))):
        with steer(model, two, rows=rows):
            assert disagreement(model(x), one_by_one(model, spread, lambda m: m(x.double()))) is None


class Stateful(Recurrent):
    """Everything that a forward may leave behind: random numbers, running statistics, counters, lists, hooks' finds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.seen = nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.last = x
        h = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.both(self.drop(h))


def test_the_measurement_leaves_no_trace() -> None:
    model, x = operated(Stateful).train(), inputs(3, 4)
    before, numbers, names = copy.deepcopy(model.state_dict()), torch.get_rng_state(), set(vars(model))
    expected = copy.deepcopy(model)
    with steer(expected, 1.0):
        expected(x)
    torch.set_rng_state(numbers)
    heard: list[torch.Tensor] = []
    model.drop.register_forward_hook(lambda module, given, out: heard.append(out))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with steer(model, torch.ones(3)):
        model(x)  # one forward, and not one more
    assert model.training
    assert model.norm.training
    assert set(vars(model)) == names | {"last"}
    assert model.last is x
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert float(model.count) == float(before["count"]) + 1
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert len(heard) == 1
    again = torch.get_rng_state()
    torch.set_rng_state(numbers)
    expected(x)
    assert torch.equal(torch.get_rng_state(), again)


@torch.no_grad()
def test_it_is_measured_once_for_each_way_to_call() -> None:
    class Counted(Flattened):
        calls = 0

        def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
            Counted.calls += 1
            return super().forward(super().forward(x) if twice else x)

    model = operated(Counted)

    def forwards(*args: Any) -> int:
        before = Counted.calls
        model(*args)
        return Counted.calls - before

    with steer(model, ROWS):
        first = forwards(inputs(3, 4))
        assert 1 < first < 12
        assert [forwards(inputs(3, length)) for length in (4, 1, 9)] == [1, 1, 1]
        assert forwards(inputs(3, 4), True) > 1
        assert forwards(inputs(3, 4), True) == 1
    with steer(model, ROWS[:1]):
        assert forwards(inputs(5, 4)) == 1
    with steer(copy.deepcopy(model), ROWS) as copied:
        assert (
            disagreement(copied(inputs(3, 4)), model.__class__.__call__(set_coeff(model, ROWS), inputs(3, 4))) is None
        )


@torch.no_grad()
def test_tokens_of_a_sequence_first_site_are_not_those_of_other_rows() -> None:
    tokens = torch.linspace(-1, 1.5, 16).reshape(4, 4)  # as many rows as positions
    for kind in (SequenceFirst, Flattened, Interleaved):
        model, x = operated(kind), inputs(4, 4)
        with steer(model, tokens):
            found = model(x)
        for i in range(4):
            expected = one_by_one(model, tokens[:, i], lambda m, x=x: m(x.double()))
            assert disagreement(found[:, i], expected[:, i]) is None


def test_a_part_that_is_called_before_the_whole_is_refused() -> None:
    model, x = operated(SequenceFirst), inputs(3, 5)
    set_coeff(model, ROWS)
    with pytest.raises(surgery.InputError, match=r"site 'a'.*has not been measured.*call that first"):
        model.a(x.transpose(0, 1))
    with torch.no_grad():
        model(x)
        part = model.a(x.transpose(0, 1))
        for i, coeff in enumerate(ROWS.tolist()):
            assert disagreement(part[:, i], set_coeff(model, coeff).a(x.transpose(0, 1))[:, i]) is None


@torch.no_grad()
def test_a_model_that_takes_no_other_contents_says_so() -> None:
    class Picky(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] != 4 or float(x[0, 0, 0]) != 3:
                raise ValueError("not mine")
            return self.both(x)

    x = inputs(3, 4)
    x[0, 0, 0] = 3
    model = operated(Picky, example_inputs=x)
    with (
        steer(model, ROWS),
        pytest.raises(surgery.InputError, match=r"cannot be measured.*ValueError: not mine.*scalar"),
    ):
        model(x)
    assert get_coeff(model) == 1.0
    assert model(x).shape == x.shape


@torch.no_grad()
def test_a_compiled_model_follows_the_rows() -> None:
    for name, (kind, dim, _) in LAYOUTS.items():
        if name == "recurrent":  # which Dynamo leaves to eager mode
            continue
        model, x = operated(kind), inputs(3, 6, dim)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with steer(model, ROWS):
            assert disagreement(compiled(x), model(x)) is None
            assert disagreement(compiled(x), one_by_one(model, ROWS, lambda m, x=x: m(x.double()), dim)) is None


@torch.no_grad()
def test_a_graph_takes_blocks_of_the_first_dimension_and_refuses_others() -> None:
    x = inputs(4, 4)
    for kind, layout in ((Flattened, None), (Interleaved, "cycles along dimension 0"), (SequenceFirst, "dimension 1")):
        model = operated(kind)
        graph = surgery.to_graph(model, x)
        coeffs = torch.linspace(-1, 1, 4)
        if layout is None:
            with steer(graph, coeffs):
                assert disagreement(graph(x), one_by_one(model, coeffs, lambda m: m(x.double()))) is None
            with steer(graph, coeffs[:2]), pytest.raises(surgery.InputError, match=r"rows='repeat'.*rows='tile'"):
                graph(x)
            for rows, spread in (("repeat", [0, 0, 1, 1]), ("tile", [0, 1, 0, 1])):
                with steer(graph, coeffs[:2], rows=rows):
                    found = graph(x)
                assert disagreement(found, one_by_one(model, coeffs[spread], lambda m: m(x.double()))) is None
        else:
            with steer(graph, coeffs), pytest.raises(surgery.InputError, match=rf"site 'a'.*{layout}.*the model that"):
                graph(x)
        with steer(graph, 0.5), steer(model, 0.5):
            assert disagreement(graph(x), model(x)) is None


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_a_row_that_is_dead_while_rows_are_measured_refuses_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 4)).eval()
    model, x = shaken(net, target_modules="all-linear", r=1), torch.randn(3, 3)
    wanted = one_by_one(model, ROWS, lambda m: m(x.double()))
    with steer(model, ROWS):
        assert disagreement(model(x), wanted) is None


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_one_value_for_all_rows_is_a_number_also_where_rows_are_refused(name: str, measured: bool) -> None:
    model, x = operated(REFUSED[name][0]), inputs(3, 4)
    if measured:
        with pytest.raises(surgery.SurgeryError), steer(model, ROWS):
            model(x)
    expected = one_by_one(model, torch.full((3,), 0.5), lambda m: m(x.double()))
    for coeff in (0.5, torch.tensor([0.5])):
        with steer(model, coeff):
            assert disagreement(model(x), expected) is None
