"""Surgery in place: identity, the right function, undo, and a model that stays what it was in every other respect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only

from surgery import set_coeff, sites, undo_surgery
from tests.support.model_state import state_of
from tests.support.operated_models import (
    each_dtype,
    each_model,
    frozen,
    operate,
    operated,
    randomise,
    reference,
)
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import ALL_NAMES, HUB_NAMES, small_model


def doubled(inputs: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


@pytest.mark.matrix
@each_dtype
@each_model
def test_identity_at_the_initial_core_and_at_coeff_zero(name, dtype):
    found, base = operated(name, dtype, scale=0.0), frozen(name, dtype).run()
    assert torch.equal(found.run(), base)
    set_coeff(randomise(found.model), 0.0)
    assert torch.equal(found.run(), base)


@pytest.mark.parametrize("name", [name for name in ALL_NAMES if name not in ("attention", "encoder_layer", "raw")])
def test_identity_holds_in_grad_mode_too(name):
    assert torch.equal(operated(name, scale=0.0).forward().detach(), frozen(name).forward())


@pytest.mark.matrix
@each_dtype
@each_model
def test_output_is_that_of_the_changed_weights(name, dtype):
    found = operated(name, dtype)
    expected = found.run(reference(found, dtype), doubled(found.inputs))
    assert_close(found.run(), expected)
    assert relative_error(small_model(name, dtype).run(), expected) > 2 * RELATIVE[dtype]


@pytest.mark.matrix
@pytest.mark.parametrize("coeff", [-1.3, 0.5, 2.0])
@each_model
def test_output_follows_coeff(name, coeff):
    found = operated(name)
    set_coeff(found.model, coeff)
    assert_close(found.run(), found.run(reference(found, torch.float32, coeff), doubled(found.inputs)))


@pytest.mark.matrix
@each_dtype
@each_model
def test_undo_restores_everything(name, dtype):
    found = small_model(name, dtype)
    parameters = list(found.model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    list(found.model.modules())[-1].train()
    before, output = state_of(found.model), found.run()
    randomise(operate(found).model)
    assert undo_surgery(found.model) is found.model
    assert state_of(found.model) == before
    assert torch.equal(found.run(), output)
    assert sites(found.model) == {}


@each_model
def test_base_tensors_are_never_written(name):
    found, bases = operated(name), dict(small_model(name).model.named_parameters())
    found.forward().sum().backward()
    undo_surgery(found.model)
    assert all(torch.equal(p, bases[name]) and p.grad is None for name, p in found.model.named_parameters())


@each_model
def test_only_core_parameters_are_trainable_and_float32(name):
    model = operated(name, torch.bfloat16).model
    cores = {id(p) for site in sites(model).values() for p in site.core.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == cores
    assert {p.dtype for p in trainable} == {torch.float32}
    assert {site.factors.U.dtype for site in sites(model).values()} == {torch.bfloat16}


@pytest.mark.matrix
@pytest.mark.parametrize("train", [False, True])
@each_model
def test_no_site_is_dead(name, train):
    found = operated(name, scale=0.0)
    found.model.train(train)

    def output() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.set_grad_enabled(train):
            return found.forward().detach()

    base = output()
    for key, site in sites(found.model).items():
        with torch.no_grad():
            site.core.g.fill_(1.0)
        assert not torch.equal(output(), base), key
        with torch.no_grad():
            site.core.g.zero_()
    assert torch.equal(output(), base)


@each_model
def test_state_dict_names_of_everything_else_stay(name):
    base, model = small_model(name).model.state_dict(), operated(name).model
    moved = {site.weight_name for site in sites(model).values() if site.host.name == "weight"}
    kept = {key for key in base if key.rpartition(".")[2] not in moved or key in model.state_dict()}
    assert all(torch.equal(model.state_dict()[key], base[key]) for key in kept)
    assert all(key.rpartition(".")[2] in moved for key in base.keys() - kept)
    added = model.state_dict().keys() - base.keys()
    assert all(".core." in f".{key}" or ".factors." in f".{key}" or ".original" in key for key in added)


@each_model
def test_state_dict_round_trip(name):
    found, other = operated(name), operated(name, scale=0.0)
    assert not any("coeff" in key for key in found.model.state_dict())
    other.model.load_state_dict(found.model.state_dict())
    assert torch.equal(other.run(), found.run())


@pytest.mark.matrix
@pytest.mark.parametrize("undone", ["copy", "original"])
@each_model
def test_deep_copies_are_independent(name, undone):
    found = operated(name)
    output, base = found.run(), small_model(name).run()
    other = copy.deepcopy(found)
    undo_surgery((other if undone == "copy" else found).model)
    assert torch.equal((found if undone == "copy" else other).run(), output)
    assert torch.equal((other if undone == "copy" else found).run(), base)
    set_coeff((found if undone == "copy" else other).model, 0.0)
    assert torch.equal((found if undone == "copy" else other).run(), base)


@each_model
def test_to_half_keeps_the_cores(name):
    found = operated(name, scale=0.5)
    cores = {key: site.core.g.detach().clone() for key, site in sites(found.model).items()}
    found.model.to(torch.bfloat16)
    for key, site in sites(found.model).items():
        assert torch.equal(site.core.g, cores[key])
        assert site.steering.coeff.dtype == torch.float32
        assert site.weight.dtype == site.factors.U.dtype == torch.bfloat16
    found.inputs = tree_map_only(torch.Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, found.inputs)
    assert_close(found.run(), found.run(reference(found, torch.bfloat16), doubled(found.inputs)))


@pytest.mark.parametrize("name", ["mlp", "attention", "encoder_layer", "raw"])
def test_double_is_exact(name):
    found = operated(name)
    found.model.double()
    assert {site.core.g.dtype for site in sites(found.model).values()} == {torch.float64}
    inputs = doubled(found.inputs)
    assert_close(found.run(inputs=inputs), found.run(reference(found, torch.float32), inputs))


@pytest.mark.parametrize("name", ["mlp", "raw", "qwen3", "gpt2"])
def test_gradients_of_the_core_are_those_of_the_changed_weights(name):
    found = operated(name)
    found.forward().square().mean().backward()
    base = reference(found, torch.float32)
    found.forward(base, doubled(found.inputs)).square().mean().backward()
    parameters = dict(base.named_parameters())
    for key, site in sites(found.model).items():
        gradient = parameters.get(key, parameters.get(f"{key}.weight")).grad
        U, S, Vh = (tensor.double() for tensor in (site.factors.U, site.factors.S, site.factors.Vh))
        gain = S * torch.exp(site.core.g.double().clamp(max=0))
        along = torch.einsum("or,oi,ri->r", U, gradient if site.layout == "out_in" else gradient.T, Vh)
        assert_close(site.core.g.grad, (gain * along).detach(), torch.float32)


@pytest.mark.parametrize("name", ["mlp", "attention", "qwen3", "t5"])
def test_training_lowers_the_loss_and_changes_the_core_only(name):
    found, base = operated(name, scale=0.0), dict(small_model(name).model.named_parameters())
    target = torch.randn_like(found.run())
    optimiser = torch.optim.AdamW([p for p in found.model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(found.forward(), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(site.core.g.abs().max() > 0 for site in sites(found.model).values())
    undo_surgery(found.model)
    assert all(torch.equal(p, base[name]) for name, p in found.model.named_parameters())


@pytest.mark.parametrize("name", HUB_NAMES)
def test_save_pretrained_of_an_undone_model_is_that_of_the_base(name, tmp_path):
    base, model = small_model(name).model, operated(name).model
    model.save_pretrained(tmp_path / "operated")  # the adapter: see test_save_pretrained.py
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert load_file(tmp_path / "operated" / "model.safetensors").keys() == trained
    undo_surgery(model).save_pretrained(tmp_path / "undone")
    base.save_pretrained(tmp_path / "base")
    saved, expected = (load_file(tmp_path / kind / "model.safetensors") for kind in ("undone", "base"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5"])
def test_generate_with_cache(name):
    found = operated(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "input_ids": found.inputs["input_ids"]}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = (found.model.generate(**options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
    base = small_model(name).model.generate(**options)
    assert relative_error(base.logits[0], cached.logits[0]) > RELATIVE[torch.float32]
