"""Roots: verbs on the whole, on parts, wrappers, copies and parents."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import apply_surgery, get_coeff, merge, set_coeff, sites, steer, undo_surgery


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)


def shaken(model: nn.Module, **options: Any) -> Any:
    apply_surgery(model, "antipasto", r=4, example_inputs=X, progress=False, **options)
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.add_(torch.linspace(-0.5, 0.8, len(site.core.g)))
    return model


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_a_site_is_still_a_linear_module_and_the_root_what_it_was() -> None:
    model = shaken(net())
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert all(isinstance(site.host.owner, nn.Linear) for site in sites(model).values())
    assert set(vars(model)) - set(vars(net())) == {"_surgery"}
    assert [name for name, _ in model.named_children()] == ["blocks", "head"]
    assert [name for name, _ in model.named_modules() if name.endswith("steering")] == ["blocks.0.up.sspace.steering"]
    assert [name for name, _ in model.named_buffers() if name.endswith("coeff")] == [
        "blocks.0.up.sspace.steering.coeff"
    ]


@pytest.mark.parametrize("attribute", ["handle", "schedule", "lowering", "core", "form", "variant", "factors", "key"])
def test_nothing_of_the_users_is_shadowed(attribute: str) -> None:
    model = net()
    setattr(model.head, attribute, "mine")
    setattr(model, attribute, "mine too")
    shaken(model)
    assert (getattr(model.head, attribute), getattr(model, attribute)) == ("mine", "mine too")
    assert sites(model)["blocks.0.up"].host.name == "module"
    undo_surgery(model)
    assert (getattr(model.head, attribute), getattr(model, attribute)) == ("mine", "mine too")


def test_a_module_with_an_attribute_sspace_is_hosted_as_a_weight() -> None:
    model = net()
    model.head.sspace = "mine"
    apply_surgery(model, "antipasto", r=4, target_modules=["head"], example_inputs=X, progress=False)
    assert sites(model)["head"].host.name == "weight"
    assert model.head.sspace == "mine"


def test_parts_are_refused_and_the_root_is_named() -> None:
    model = shaken(net())
    for verb in (set_coeff, lambda m, _: undo_surgery(m), lambda m, _: merge(m), lambda m, _: surgery.refresh(m)):
        with pytest.raises(surgery.SurgeryError, match="part of a Net"):
            verb(model.blocks[0], 0.5)
    assert get_coeff(model) == 1.0


def test_a_module_that_contains_roots_sets_all_of_them() -> None:
    both = nn.Identity()
    pair = nn.ModuleList([shaken(net()), shaken(net()), both])
    set_coeff(pair, 0.25)
    assert [get_coeff(pair[i]) for i in (0, 1)] == [0.25, 0.25]
    set_coeff(pair[0], 0.5)
    with pytest.raises(surgery.InputError, match="different coefficients"):
        get_coeff(pair)
    with steer(pair, -1.0):
        assert get_coeff(pair) == -1.0
    assert [get_coeff(pair[i]) for i in (0, 1)] == [0.5, 0.25]
    undo_surgery(pair)
    assert not sites(pair)


def test_a_copy_of_a_part_is_a_root_of_its_own() -> None:
    model = shaken(net())
    base = net()
    part = copy.deepcopy(model.blocks[0])
    set_coeff(part, 0.0)
    assert torch.equal(part(X), base.blocks[0](X))
    assert get_coeff(model) == 1.0
    set_coeff(model, 0.5)
    assert get_coeff(part) == 0.0
    undo_surgery(part)
    assert torch.equal(part(X), base.blocks[0](X))
    assert all(parameter.requires_grad for parameter in part.parameters())


def test_a_layer_that_was_moved_elsewhere_is_a_root_of_its_own() -> None:
    model = shaken(net())
    layer = model.blocks[1]
    del model.blocks[1]
    set_coeff(layer, 0.0)
    assert torch.equal(layer(X), net().blocks[1](X))
    assert get_coeff(model) == 1.0


def test_whole_copies_and_pickles_are_independent() -> None:
    model = shaken(net())
    expected = model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(duplicate(X), expected)
        set_coeff(duplicate, 0.0)
        assert torch.equal(duplicate(X), net()(X))
        with pytest.raises(surgery.SurgeryError, match="part of"):
            set_coeff(duplicate.blocks[0], 1.0)
        undo_surgery(duplicate)
        assert type(duplicate) is Net
    assert get_coeff(model) == 1.0


def test_surgery_on_a_parent_adopts_the_roots_below() -> None:
    model = net()
    plain = copy.deepcopy(model)
    shaken(model.blocks[0], target_modules=["up"])
    set_coeff(model.blocks[0], 1.0)
    expected = model(X)
    apply_surgery(
        model, "antipasto", r=3, target_modules="all-linear", exclude_modules=["blocks.0.up"], example_inputs=X,
        progress=False,
    )  # fmt: skip
    assert set(sites(model)) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"}
    assert torch.equal(model(X), expected)
    assert [n for n, _ in model.named_buffers() if n.endswith("coeff")] == ["blocks.0.up.sspace.steering.coeff"]
    set_coeff(model, 0.0)
    assert torch.equal(model(X), plain(X))
    with pytest.raises(surgery.SurgeryError, match="part of a Net"):
        set_coeff(model.blocks[0], 1.0)
    undo_surgery(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_parent_that_is_refused_leaves_the_roots_below() -> None:
    model = net()
    shaken(model.blocks[0], target_modules=["up"])
    expected, state = model(X), sorted(model.state_dict())
    with pytest.raises(surgery.TargetError, match="already carries"):
        apply_surgery(model, "antipasto", r=3, target_modules="all-linear", example_inputs=X, progress=False)
    assert sorted(model.state_dict()) == state
    assert torch.equal(model(X), expected)
    set_coeff(model.blocks[0], 0.0)
    assert torch.equal(model(X), net()(X))


def test_a_subclass_that_scales_its_output_is_not_hosted_by_class() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3

    class Plain(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = nn.Sequential(Scaled(8, 8), nn.Tanh(), Plain(8, 8)).eval()
    shaken(model, target_modules=["0", "2"])
    assert {key: site.host.name for key, site in sites(model).items()} == {"0": "weight", "2": "module"}
    live = model(X)
    assert torch.allclose(merge(model)(X), live, atol=1e-5)
    assert [type(m) for m in model] == [Scaled, nn.Tanh, Plain]


def test_our_class_alone_is_taken_off_from_under_others() -> None:
    from torch.distributed.fsdp import FSDPModule

    model = shaken(net())
    head = model.head
    cls = type(head)
    head.__class__ = type("FSDPLinear", (FSDPModule, cls), {"__doc__": None})
    undo_surgery(model)
    assert type(head).__bases__ == (FSDPModule, nn.Linear)
    assert not any("sspace" in str(vars(c).get("_sspace_mixin", "")) for c in type(head).__mro__)


def test_a_coefficient_that_something_else_overwrote_is_written_back() -> None:
    """DistributedDataParallel broadcasts the buffers of the first rank in place, before each forward."""
    model = shaken(net())
    set_coeff(model, 0.5)
    with torch.no_grad():
        expected = model(X)
        next(iter(sites(model).values())).steering.coeff.fill_(7.0)
        assert torch.equal(model(X), expected)
    rows = torch.tensor([0.5, -1.0])
    with steer(model, rows), torch.no_grad():
        expected = model(X)
        next(iter(sites(model).values())).steering.coeff.fill_(7.0)
        assert torch.equal(model(X), expected)


def test_an_export_of_a_part_is_refused(tmp_path: Any) -> None:
    from exporters import export

    model = shaken(net())
    with pytest.raises(surgery.SurgeryError, match="part of a Net"):
        export(model.blocks[0], "pt2", tmp_path / "a.pt2", example_inputs=X)
    assert not list(tmp_path.iterdir())


def test_replicas_of_data_parallel_refuse_rows() -> None:
    model = shaken(net())
    expected = model(X)
    replica = model._replicate_for_data_parallel()
    assert torch.allclose(replica(X), expected, atol=1e-6)
    with steer(model, torch.tensor([0.5, -1.0])), pytest.raises(surgery.InputError, match="DataParallel"):
        replica(X)


@pytest.mark.parametrize("verb", [undo_surgery, merge])
def test_whoever_wrapped_a_forward_meanwhile_goes_on(verb: Any) -> None:
    model = shaken(net())
    live, base = model(X), net()(X)
    wrapped = model.head.forward
    model.head.forward = lambda *args: wrapped(*args)
    assert torch.equal(model(X), live)
    verb(model)
    expected = base if verb is undo_surgery else live
    assert torch.allclose(model(X), expected, atol=1e-5)


def test_calls_of_two_threads_have_the_coefficients_of_their_own_tokens() -> None:
    first, entered, go = threading.get_ident(), threading.Event(), threading.Event()

    class Waiting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.get_ident() == first and x.shape[1] == 3:
                entered.set()
                go.wait(0.3)
            return super().forward(x)

    torch.manual_seed(0)
    model = shaken(Waiting().eval())
    tokens, short = torch.tensor([[0.0, 1.0, -1.0], [0.5, -0.5, 2.0]]), X[:, :2]
    found: list[torch.Tensor] = []

    def other() -> None:
        entered.wait()
        with torch.no_grad():
            found.append(model(short))
        go.set()

    with torch.no_grad(), steer(model, tokens):
        expected = [model(X[:, :3]), model(short)]
        entered.clear()
        thread = threading.Thread(target=other)
        thread.start()
        mine = model(X[:, :3])
        thread.join()
    assert torch.equal(mine, expected[0])
    assert torch.equal(found[0], expected[1])
