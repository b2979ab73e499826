"""What refusals say: what was expected, what was found, and what to do instead."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import apply_surgery, merge, report, sites
from tests.support.zoo import small_model


def refused(model: nn.Module, kind: type[Exception] = surgery.SurgeryError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        apply_surgery(model, "antipasto", r=4, progress=False, **options)
    assert not sites(model)
    return str(caught.value)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Named(nn.Module):
    """Two blocks, each with an ``up`` and a ``down``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["down"](block["up"](x))
        return x


@pytest.mark.parametrize(("text", "listed"), [("up", "['up']"), ("up,down", "['up', 'down']"), ("0.up", "['0.up']")])
def test_a_text_that_would_match_as_a_list_offers_the_list(text, listed):
    message = refused(Named(), surgery.TargetError, target_modules=text)
    assert f"no site matches {text!r}" in message
    assert "a text is a regular expression for whole keys" in message
    assert f"target_modules={listed}" in message
    assert "did you mean" not in message


def test_an_entry_of_a_list_that_would_match_as_a_text_offers_the_text():
    message = refused(Named(), surgery.TargetError, target_modules=[r".*\.up"])
    assert r"the text target_modules='.*\\.up' is a regular expression" in message


@pytest.mark.parametrize("exclude", ["up", [r".*\.up"]])
def test_an_exclusion_that_leaves_nothing_out_says_so(exclude):
    with pytest.warns(UserWarning, match="leaves nothing out by .* exclude_modules="):
        apply_surgery(Named(), "antipasto", r=4, exclude_modules=exclude, progress=False)


def test_an_exclusion_that_leaves_something_out_is_silent():
    with warnings.catch_warnings(action="error"):
        model = apply_surgery(Named(), "antipasto", r=4, exclude_modules=["up"], progress=False)
    assert list(sites(model)) == ["blocks.0.down", "blocks.1.down"]


def test_complex_weights_are_called_complex():
    model = nn.Sequential(nn.Linear(6, 8, dtype=torch.complex64))
    message = refused(model, surgery.WeightError)
    assert "site '0': its weight is complex (torch.complex64)" in message
    assert "quantised" not in message


def test_a_subclass_is_called_a_subclass():
    class Tagged(torch.Tensor):
        pass

    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Tagged))
    message = refused(model, surgery.WeightError)
    assert "is a Tagged (tests) of torch.float32, a subclass of torch.Tensor" in message
    assert "quantised" not in message


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_a_core_that_is_not_finite_is_not_called_an_overflow(value, word):
    model = apply_surgery(mlp(), "antipasto", r=4, progress=False)
    with torch.no_grad():
        sites(model)["2"].core.g[1] = value
    with pytest.raises(surgery.InputError) as caught:
        merge(model)
    assert f"site '2': its core tensor 'g' is not finite (1 of 4 entries, {word})" in str(caught.value)
    assert "overflow" not in str(caught.value)


def test_an_overflow_is_called_one():
    model = apply_surgery(mlp().half(), "antipasto", r=4, progress=False)
    with torch.no_grad():
        sites(model)["0"].core.g.fill_(1e6)
    with pytest.raises(surgery.InputError, match=r"overflows torch\.float16; lower coeff or the gains"):
        merge(model)


class Branches(nn.Module):
    """Its branch on data cannot be captured; it also prints on the standard error stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import sys

        print("a line of the model's own", file=sys.stderr)
        y = self.a(x)
        return self.b(y) if y.sum() > 0 else y


def test_a_walk_that_takes_over_prints_no_partial_graph(capfd):
    model = apply_surgery(Branches(), "antipasto", r=4, example_inputs=torch.ones(2, 6), progress=False)
    printed = capfd.readouterr()
    assert "module walk" in report(model).how
    assert any("not captured" in note for note in report(model).notes)
    assert "def forward" not in printed.err + printed.out
    assert "symbolic_shapes" not in printed.err
    assert set(printed.err.splitlines()) == {"a line of the model's own"}


class Waits(nn.Module):
    """A model that stays in its forward until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.waits = False
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.waits:
            self.begun.set()
            assert self.go_on.wait(20)
        return y + self.inner(y)


@pytest.mark.parametrize("verb", ["apply_surgery", "undo_surgery", "merge"])
def test_a_model_that_another_thread_runs_is_not_changed(verb):
    model, x = Waits().eval(), torch.ones(2, 6)
    if verb != "apply_surgery":
        apply_surgery(model, "antipasto", r=4, progress=False)
    expected, found = model(x), []
    model.waits = True
    thread = threading.Thread(target=lambda: found.append(model(x)), name="the server")
    thread.start()
    try:
        assert model.begun.wait(20)
        call = {
            "apply_surgery": lambda: apply_surgery(model, "antipasto", r=4, progress=False),
            "undo_surgery": lambda: surgery.undo_surgery(model),
            "merge": lambda: merge(model),
        }[verb]
        with pytest.raises(surgery.SurgeryError, match=r"thread 'the server' is running this Waits.* wait until"):
            call()
        apply_surgery(mlp(), "antipasto", r=4, progress=False)  # another model is nobody's business
    finally:
        model.go_on.set()
        thread.join(20)
    assert torch.equal(found[0], expected)
    model.waits = False
    call()


def wrapped_by_peft() -> Any:
    import peft

    found = small_model("qwen3")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return found, peft.get_peft_model(found.model, config).eval()


def test_surgery_on_a_peft_model_is_on_its_base_layers():
    found, model = wrapped_by_peft()
    before = found.run(model)
    apply_surgery(model, "antipasto", r=4, target_modules=["q_proj", "k_proj"], progress=False)
    endings = {key.split("self_attn.")[1] for key in sites(model)}
    assert endings == {"q_proj.base_layer", "k_proj"}
    assert torch.equal(found.run(model), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"g"}
    reasons = {skip.where: skip.reason for skip in report(model).skipped if "lora_" in skip.where}
    assert len(reasons) == 2 * 2 * found.model.config.num_hidden_layers
    assert all("PEFT's own adapter, which stays as it is, frozen" in reason for reason in reasons.values())
    with torch.no_grad():
        for site in sites(model).values():
            site.core.g.fill_(0.5)
    assert not torch.allclose(found.run(model), before)
    surgery.undo_surgery(model)
    assert torch.equal(found.run(model), before)
    assert any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)


def test_what_belongs_to_peft_is_refused_by_name():
    _, model = wrapped_by_peft()
    with pytest.raises(surgery.TargetError, match=r"lora_A\.default' is no site: a part of PEFT's own adapter"):
        apply_surgery(model, "antipasto", r=4, target_modules=["lora_A.default"], progress=False)


def test_a_module_that_peft_keeps_twice_is_no_site():
    import peft

    model = small_model("qwen3").model
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["up_proj"])
    model = apply_surgery(peft.get_peft_model(model, config), "antipasto", r=4, progress=False)
    assert not [key for key in sites(model) if "up_proj" in key]
    assert any("copies that PEFT keeps" in skip.reason for skip in report(model).skipped)
