"""The user's module stays the user's: what people do to modules before surgery and after it, a line for each habit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import surgery
from surgery import apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, undo_surgery
from tests.support.model_state import state_of
from tests.support.tolerance import assert_close
from tests.support.user_models import Net, X, operated, run


class WantsKeyword(nn.Linear):
    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)


class RootWantsKeyword(Net):
    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)


class Closed:
    """Mixin that takes no new attributes once it is made."""

    def __setattr__(self, name: str, value: Any) -> None:
        if "closed" in vars(self) and name not in vars(self):
            raise AttributeError(f"{name} is not for you to set")
        super().__setattr__(name, value)


class ClosedLinear(Closed, nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.closed = True


class ClosedNet(Closed, nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.closed = True


class ClosedReader(Closed, Net):
    def __init__(self) -> None:
        super().__init__()
        self.closed = True


class Answers(nn.Linear):
    """Has an answer to any name."""

    def __getattr__(self, name: str) -> Any:
        return 42 if name.startswith(("magic", "sspace_", "adapter")) else super().__getattr__(name)


class Slotted(nn.Linear):
    __slots__ = ("note",)


class Scaled(nn.Linear):
    """Scales its own output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class ScaledCall(nn.Linear):
    """Scales it in the call, which no forward shows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 3 * super().__call__(*args, **kwargs)


class Twice(nn.Module):
    """A weight that is a property of another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(8, 8))

    @property
    def weight(self) -> torch.Tensor:
        return self.raw * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Final(type):
    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **options: Any) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError(f"{bases[0].__name__} is final")
        return super().__new__(cls, name, bases, body)


class FinalLinear(nn.Linear, metaclass=Final):
    pass


class FinalNet(Net, metaclass=Final):
    pass


def owns(made: nn.Module, *names: str) -> nn.Module:
    for name in names:
        setattr(made, name, "mine")
    return made


def slotted() -> nn.Module:
    made = Slotted(8, 8)
    made.note = "mine"
    return made


def hooked() -> nn.Module:
    made = nn.Linear(8, 8)
    made.register_forward_hook(lambda module, args, output: 2 * output)
    made.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return made


def on_the_instance() -> nn.Module:
    made = nn.Linear(8, 8)
    forward = made.forward
    made.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return made


BEFORE: dict[str, Callable[[], nn.Module]] = {
    "a class that wants a keyword of its subclasses": lambda: Net(WantsKeyword(8, 8)),
    "a root that does": RootWantsKeyword,
    "a class that takes no new attributes": lambda: Net(ClosedLinear()),
    "a root that does not either": ClosedNet,
    "a class that answers to any name": lambda: Net(Answers(8, 8)),
    "slots": lambda: Net(slotted()),
    "an output that is scaled": lambda: Net(Scaled(8, 8)),
    "a call that scales": lambda: Net(ScaledCall(8, 8)),
    "a weight that is a property": lambda: Net(Twice()),
    "names of ours": lambda: Net(
        owns(nn.Linear(8, 8), "sspace", "adapter", "host", "record", "steering", "_surgery", "coeff")
    ),
    "a root with names of ours": lambda: owns(Net(), "sspace", "adapter", "host", "steering", "coeff"),
    "hooks": lambda: Net(hooked()),
    "a forward on the instance": lambda: Net(on_the_instance()),
    "weight_norm": lambda: Net(parametrizations.weight_norm(nn.Linear(8, 8))),
    "orthogonal": lambda: Net(parametrizations.orthogonal(nn.Linear(8, 8))),
    "spectral_norm": lambda: Net(parametrizations.spectral_norm(nn.Linear(8, 8))),
    "the older weight_norm": lambda: Net(nn.utils.weight_norm(nn.Linear(8, 8))),
    "the older spectral_norm": lambda: Net(nn.utils.spectral_norm(nn.Linear(8, 8))),
    "a pruned weight": lambda: Net(prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.3)),
    "a pruned bias": lambda: Net(prune.l1_unstructured(nn.Linear(8, 8), "bias", 0.3)),
    "one weight in two modules": lambda: tied(),
}


def tied() -> nn.Module:
    made = Net()
    made.b.weight = made.a.weight
    return made


def expected_of(model: nn.Module, base: nn.Module) -> torch.Tensor:
    """The base in float64 with ``W + U diag(S elu(g)) Vh`` in the place of each site's weight."""
    wide = base.double()
    for key, site in sites(model).items():
        U, S, Vh = (t.double() for t in (site.factors.U, site.factors.S, site.factors.Vh))
        delta = U * (S * F.elu(site.core.g.double())) @ Vh
        tensors = dict(wide.named_parameters(remove_duplicate=False))
        weight = tensors[key] if key in tensors else tensors[f"{key}.weight"]
        with torch.no_grad():
            weight += delta if site.layout == "out_in" else delta.T
    with torch.no_grad():
        found: torch.Tensor = wide(X.double())
    return found


@pytest.mark.parametrize("habit", BEFORE)
def test_a_habit_before_surgery(habit: str, tmp_path: Any) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return BEFORE[habit]().eval()

    model = made()
    before, output = state_of(model), run(model)
    kind = type(model)
    operated(model)
    assert sites(model)
    assert isinstance(model, kind)
    live = run(model)
    assert_close(live, expected_of(model, made()))
    set_coeff(model, 0.0)
    assert torch.equal(run(model), output)
    set_coeff(model, 1.0)
    loaded = load_adapter(made(), save_adapter(model, tmp_path), progress=False)
    assert_close(run(loaded), live)
    assert_close(run(merge(operated(made()))), live)
    undo_surgery(model)
    assert state_of(model) == before
    assert torch.equal(run(model), output)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: Net(FinalLinear(8, 8)), surgery.WeightError, "site 'a': .* FinalLinear cannot be parametrised"),
    (FinalNet, surgery.SurgeryError, "FinalNet cannot be a root, .* nn.Sequential"),
    (ClosedReader, surgery.WeightError, "site 'w': .* ClosedReader cannot be parametrised .*not for you"),
    (lambda: owns(Net(), "_surgery"), surgery.SurgeryError, "Net has an attribute '_surgery' .* nn.Sequential"),
])  # fmt: skip
def test_what_cannot_be_hosted_is_refused_by_name(make: Any, error: Any, words: str) -> None:
    model = make().eval()
    before = state_of(model)
    with pytest.raises(error, match=words):
        operated(model)
    assert state_of(model) == before
    wrapped = nn.Sequential(model) if "nn.Sequential" in words else model
    apply_surgery(wrapped, "antipasto", r=4, exclude_modules=["a", "w"], example_inputs=X, progress=False)
    assert [key.rpartition(".")[2] for key in sites(wrapped)] == ["b"]
    undo_surgery(wrapped)
    assert state_of(model) == before


AFTER: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.a),
    "orthogonal": lambda m: parametrizations.orthogonal(m.a),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.a),
    "the older weight_norm": lambda m: nn.utils.weight_norm(m.a),
    "a pruned weight": lambda m: prune.l1_unstructured(m.a, "weight", 0.3),
    "a pruned bias": lambda m: prune.l1_unstructured(m.a, "bias", 0.3),
    "hooks": lambda m: m.a.register_forward_hook(lambda module, args, output: 2 * output),
    "a forward on the instance": lambda m: wrap_forward(m.a),
    "an attribute": lambda m: [setattr(m.a, n, "mine") for n in ("handle", "host", "record", "core", "adapter")],
    "another bias": lambda m: setattr(m.a, "bias", nn.Parameter(torch.ones(8), requires_grad=False)),
}


def wrap_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("habit", AFTER)
@pytest.mark.parametrize("training", [False, True])
def test_a_habit_after_surgery(habit: str, training: bool) -> None:
    torch.manual_seed(0)
    model, base = Net(), Net()
    base.load_state_dict(model.state_dict())
    operated(model)
    sites_before = dict(sites(model))
    torch.manual_seed(1)
    AFTER[habit](model)
    torch.manual_seed(1)
    AFTER[habit](base)
    model.train(training and habit != "spectral_norm")  # which iterates at each call
    base.eval()
    live = run(model)
    weight = base.a.weight.detach().double()
    site = sites_before["a"]
    hidden = F.linear(X.double(), weight + site.delta_weight(torch.float64).detach(), base.a.bias.detach().double())
    hidden = 2 * hidden if habit in ("hooks", "a forward on the instance") else hidden
    for key, name in (("b", "b.weight"), ("w", "w")):
        with torch.no_grad():
            base.get_parameter(name).data += sites_before[key].delta_weight().detach()
    y = F.linear(torch.tanh(hidden), base.b.weight.detach().double(), base.b.bias.detach().double())
    assert_close(live, y @ base.w.detach().double())
    copied = copy.deepcopy(model)
    if "weight" in dict(copied.a.named_parameters(recurse=False)):
        assert_close(run(merge(copied)), live)
    else:
        with pytest.raises(surgery.WeightError, match="site 'a': its weight was parametrised or pruned since surgery"):
            merge(copied)
    undo_surgery(model.eval())
    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(1)
    AFTER[habit](plain)
    assert_close(run(model), run(plain.eval()).double())
    assert not sites(model)


WHOLE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(saved(m), weights_only=False),
    "deepcopy": copy.deepcopy,
    "a copy of a pickle of a copy": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(m)))),
}


def saved(model: nn.Module) -> io.BytesIO:
    found = io.BytesIO()
    torch.save(model, found)
    found.seek(0)
    return found


@pytest.mark.parametrize("how", WHOLE)
@pytest.mark.parametrize("make", [Net, lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)])
def test_a_whole_model_is_pickled_and_copied(make: Any, how: str) -> None:
    torch.manual_seed(0)
    model, base = make(), make()
    base.load_state_dict(model.state_dict())
    operated(model)
    live = run(model)
    duplicate = WHOLE[how](model)
    assert torch.equal(run(duplicate), live)
    set_coeff(duplicate, 0.0)
    assert torch.equal(run(duplicate), run(base.eval()))
    assert torch.equal(run(model), live)
    undo_surgery(duplicate)
    assert torch.equal(run(duplicate), run(base))
    assert type(duplicate) is type(base)
    assert [type(m) for m in duplicate.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(run(model), live)
    undo_surgery(model)
    assert torch.equal(run(model), run(base))


def test_dynamic_quantisation_of_torch_goes_by_exact_type_and_leaves_sites_alone() -> None:
    torch.manual_seed(0)
    model = operated(Net())
    live = run(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(run(quantised), live)
    assert set(sites(quantised)) == set(sites(model))
