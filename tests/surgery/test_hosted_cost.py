"""Weights that are read without a call are cached in inference as other sites are: never stale, and at a told cost."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery import apply_surgery, refresh, report, set_coeff, sites, steer, to_graph
from surgery.modules.weight_change import WeightChange
from tests.support import expert_models
from tests.support.tolerance import assert_close

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    """A weight that is read, twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T @ self.w.T


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.core.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def operated(variant: str = "antipasto") -> nn.Module:
    return shaken(apply_surgery(Reads().eval(), variant, r=4, example_inputs=X, progress=False))


def expected(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In float64, by the gain's own formula."""
    site = next(iter(sites(model).values()))
    U, S, Vh, g = (t.detach().double() for t in (site.factors.U, site.factors.S, site.factors.Vh, site.core.g))
    gain = torch.nn.functional.elu(float(site.steering.coeff) * g)
    w = site.host.parameter().detach().double()
    w = w + (U * (S * gain)) @ Vh
    return x.double() @ w.T @ w.T


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sites whose weight was changed, in turn."""
    found: list[str] = []
    plain = WeightChange.changed_weight

    def counted(self: Any, weight: torch.Tensor) -> torch.Tensor:
        found.append(self.key)
        return plain(self, weight)

    monkeypatch.setattr(WeightChange, "changed_weight", counted)
    return found


def test_a_weight_is_changed_once_in_inference(made):
    model = operated()
    made.clear()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            first, second = model(X), model(X)
    assert len(made) == 1
    assert torch.equal(first, second)
    assert_close(first, expected(model, X))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "coeff": lambda m: set_coeff(m, -0.6),
    "core": lambda m: in_place(core(m)),
    "core, by data": lambda m: refresh([core(m).data.mul_(-1)] and m),
    "core, assigned": lambda m: m.load_state_dict(
        {k: v * 0.5 if ".core." in k else v for k, v in m.state_dict().items()}, assign=True
    ),
    "optimiser": lambda m: step(m),
    "fused optimiser": lambda m: step(m, fused=True),
    "double": lambda m: m.double(),
    "train and eval": lambda m: m.train().eval(),
    "what was handed out": lambda m: in_place(m.w),
}


def site(model: nn.Module) -> Any:
    return next(iter(sites(model).values()))


def core(model: nn.Module) -> nn.Parameter:
    return site(model).core.g


def in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(-0.7)


def step(model: nn.Module, **options: Any) -> None:
    optimiser = torch.optim.AdamW([core(model)], lr=0.1, **options)
    model(X).pow(2).sum().backward()
    optimiser.step()


ANOTHER: dict[str, Callable[[nn.Module], Any]] = {
    "weight": lambda m: in_place(site(m).host.parameter()),
    "weight, another": lambda m: setattr(m.parametrizations.w, "original", nn.Parameter(torch.ones(6, 6), False)),
    "factor": lambda m: in_place(site(m).factors.S),
}


@pytest.mark.parametrize("change", ANOTHER)
def test_another_base_is_refused_in_the_next_call(change):
    model = operated()
    with torch.no_grad():
        model(X)
        ANOTHER[change](model)
        with pytest.raises(surgery.SurgeryError, match="site 'w': its base weight is not the one"):
            model(X)


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_never_stale(change):
    model = operated()
    with torch.no_grad():
        model(X)
        before = model(X)
    CHANGES[change](model)
    with torch.no_grad():
        x = X.to(site(model).host.parameter().dtype)
        assert_close(model(x), expected(model, x), torch.float32)
        with steer(model, 0.0):
            w = site(model).host.parameter()
            assert torch.equal(model(x), x @ w.T @ w.T)
        assert_close(model(x), expected(model, x), torch.float32)
    moved = not torch.allclose(before.double(), expected(model, x))
    assert moved == (change not in ("double", "train and eval", "what was handed out"))


def test_what_reads_it_as_a_tensor_may_write_to_it():
    class Writes(Reads):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = self.w
            y = x @ w.T
            if not torch.is_grad_enabled() and type(w) is torch.Tensor:
                w.mul_(0)  # the base's parameter would be gone
            return y

    model = shaken(apply_surgery(Writes().eval(), "antipasto", r=4, example_inputs=X, progress=False))
    with torch.no_grad():
        first = model(X)
        assert torch.equal(model(X), first)


def test_training_is_not_cached_and_has_its_gradients(made):
    model = operated()
    with torch.no_grad():
        model(X)
    made.clear()
    model(X).sum().backward()
    assert len(made) == 2
    assert core(model).grad.abs().max() > 0
    made.clear()
    base = site(model).host.parameter().requires_grad_()
    core(model).requires_grad_(False)
    model(X).sum().backward()
    assert len(made) == 2
    assert base.grad.abs().max() > 0


def test_graphs_exports_and_compiled_code_see_the_computation(made):
    model = operated()
    with torch.no_grad():
        wanted = model(X)
        program = torch.export.export(model, (X,))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(X), wanted)
        set_coeff(model, 0.3)
        assert_close(compiled(X), expected(model, X), torch.float32)
        assert_close(to_graph(model, X)(X), expected(model, X), torch.float32)
        assert_close(program.module()(X), expected(model, X), torch.float32)  # it shares coeff


def test_a_copy_and_rows_do_not_read_the_originals_weight():
    model = operated()
    with torch.no_grad():
        model(X)
        copied = copy.deepcopy(model)
        set_coeff(copied, -1.0)
        assert_close(copied(X), expected(copied, X), torch.float32)
        assert_close(model(X), expected(model, X), torch.float32)
        with pytest.raises(surgery.InputError):
            set_coeff(model, torch.ones(3))


def test_autocast_does_not_stay_in_a_cached_weight():
    model = operated()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(X)
        assert_close(model(X), expected(model, X), torch.float32)


def test_within_torchs_own_cache_coeff_has_its_effect():
    model = operated()
    with torch.no_grad(), parametrize.cached():
        assert_close(model(X), expected(model, X), torch.float32)
        with steer(model, -0.5):
            assert_close(model(X), expected(model, X), torch.float32)
        model.train()
        assert_close(model(X), expected(model, X), torch.float32)


class Doubles(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_beside_a_parametrisation_of_the_users():
    model = apply_surgery(Reads().eval(), "antipasto", r=4, example_inputs=X, progress=False)
    its = vars(type(model))["w"].its
    parametrize.register_parametrization(model, "w", Doubles())
    w = 2 * site(model).host.parameter()
    with torch.no_grad():
        assert torch.equal(model(X), X @ w.T @ w.T)
        shaken(model)
        assert_close(model(X), 4 * expected(model, X), torch.float32)
        assert torch.equal(model(X), model(X))
        surgery.undo_surgery(model)
        assert torch.equal(model(X), X @ w.T @ w.T)
    assert vars(type(model))["w"] is its


@pytest.mark.parametrize("parts", [["q", "v"], ["in_proj_weight"]])
def test_parts_of_a_packed_weight_are_cached_together(parts, made):
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
    names = [f"in_proj_weight.{part}" for part in parts] if "q" in parts else parts
    apply_surgery(model, "antipasto", r=4, target_modules=names, example_inputs=(x, x, x), progress=False)
    plain = copy.deepcopy(surgery.merge(copy.deepcopy(shaken(model))))
    made.clear()
    with torch.no_grad():
        first, second = model(x, x, x)[0], model(x, x, x)[0]
        assert len(made) == len(parts)
        assert torch.equal(first, second)
        assert_close(first, plain(x, x, x)[0], torch.float32)


def test_the_report_tells_the_lowering_its_cost_and_the_memory():
    model = operated()
    row = report(model).sites[0]
    assert (row.host, row.lowering, row.lowering_training) == ("weight", "changed weight, cached", "changed weight")
    assert 0 < row.cost < row.cost_training
    assert row.cached == 6 * 6 * 4
    assert "inference caches up to 0.0 MiB" in str(report(model))
    graph = report(to_graph(model, X)).sites[0]  # where it is a product like any other
    assert (graph.host, graph.lowering, graph.cached) == ("graph", "lowrank", 0)
    assert graph.cost > 0


class Batched(nn.Module):
    """A stack of matrices, which graphs change as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(3, -1, -1), self.w)


def test_the_report_of_a_weight_that_a_graph_changes_in_each_call():
    model = apply_surgery(Batched().eval(), "antipasto", r=4, example_inputs=X, progress=False)
    row, graph = report(model).sites[0], report(to_graph(model, X)).sites[0]
    assert (row.host, row.lowering, row.cached) == ("weight", "changed weight, cached", 3 * 6 * 6 * 4)
    assert (graph.host, graph.lowering, graph.cached) == ("weight", "changed weight", 0)
    assert graph.cost > row.cost


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_report_of_stacked_experts(name):
    model = expert_models.operated(name)
    rows = [row for row in report(model).sites if row.stack]
    assert rows
    for row in rows:
        assert row.lowering == "changed weight, cached"
        assert row.cost > 0
        assert row.cached == row.stack * row.d_out * row.d_in * 4


def test_one_token_through_stacked_experts_computes_what_the_base_computes():
    import transformers

    sizes = expert_models.SIZES | {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=128)
    torch.manual_seed(0)
    base = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    targets = ["gate_up_proj", "down_proj"]
    model = apply_surgery(copy.deepcopy(base), "antipasto", r=16, target_modules=targets, progress=False)
    ids = torch.tensor([[5]])

    def operations(run: nn.Module) -> Counter[str]:
        with Operations() as seen:
            run(ids)
        return seen.found

    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert operations(model) == operations(base)
        set_coeff(model, 0.5)
        assert operations(model) != operations(base)  # once
        assert operations(model) == operations(base)


class Operations(TorchDispatchMode):
    """Counts what is computed, and of what size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, torch.Tensor):
            self.found[f"{func} {tuple(out.shape)}"] += 1
        return out
