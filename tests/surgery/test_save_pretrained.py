"""What a Trainer and ``save_pretrained`` save of an operated model loads as what was in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery import apply_surgery, load_adapter, merge, save_adapter, set_coeff, sites, undo_surgery
from surgery.storage.adapter_file import CONFIG, TENSORS
from surgery.storage.model_card import CARD
from surgery.storage.trainer_files import CHECKPOINT, HUB_CONFIG
from tests.support.adapter_files import configuration
from tests.support.model_state import state_of
from tests.support.operated_models import randomise
from tests.support.saved_adapters import contents
from tests.support.trainer_runs import BESIDE, base, logits, operated, trainer, warnings_of_transformers

FILES = {TENSORS, CONFIG, CARD, CHECKPOINT, HUB_CONFIG}


def trained(*, tie: bool = False) -> Any:
    model = operated(tie=tie)
    randomise(model, 0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.model.norm.weight.add_(0.1)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_trainer_saves_resumes_and_takes_the_best(tmp_path):
    """The whole journey: checkpoints, resuming bit for bit, the best model at the end, a checkpoint as an adapter."""
    whole = operated()
    done = trainer(whole, tmp_path / "whole")
    done.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert {*FILES, "optimizer.pt", "trainer_state.json"} <= set(os.listdir(checkpoint))
    cores = {f"{key}.sspace.core.g" for key in sites(whole)}
    assert load_file(checkpoint / CHECKPOINT).keys() == {*cores, *BESIDE}

    resumed = operated()
    with warnings_of_transformers() as said:
        trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert [line for line in said if "keys" in line] == []
    assert_same(values(resumed), values(whole))

    best = operated()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(best, tmp_path / "best", greater_is_better=True, **options)  # so that the best is not the last one
    with warnings_of_transformers() as said:
        run.train()
    assert [line for line in said if "keys" in line] == []
    chosen = Path(run.state.best_model_checkpoint)
    assert chosen.name != "checkpoint-8"
    for name, tensor in load_file(chosen / CHECKPOINT).items():
        assert torch.equal(best.get_parameter(name), tensor)

    fresh = base()
    before = state_of(fresh)
    load_adapter(fresh, chosen, progress=False)
    assert torch.equal(logits(fresh), logits(best))
    undo_surgery(fresh)
    assert state_of(fresh) == before


def test_checkpoints_without_an_optimizer(tmp_path):
    model = operated()
    trainer(model, tmp_path, save_only_model=True, max_steps=2).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert torch.equal(logits(load_adapter(base(), tmp_path / "checkpoint-2", progress=False)), logits(model))


@pytest.mark.parametrize("tie", [False, True])
def test_what_is_saved_loads_as_what_was_in_memory(tie, tmp_path):
    model, fresh = trained(tie=tie), base(tie=tie)
    model.save_pretrained(tmp_path / "one")
    assert set(os.listdir(tmp_path / "one")) == FILES
    before = state_of(fresh)
    load_adapter(fresh, tmp_path / "one", progress=False)
    assert torch.equal(logits(fresh), logits(model))
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) is tie
    fresh.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    undo_surgery(fresh)
    assert state_of(fresh) == before


def test_the_configuration_of_the_base_is_in_the_header_without_paths(tmp_path):
    model = trained()
    model.config.name_or_path = str(tmp_path / "somewhere" / "tiny")
    model.save_pretrained(tmp_path / "one")
    kept = configuration(tmp_path / "one")["base_config"]
    assert (kept["architectures"], kept["model_type"], kept["dtype"]) == (["Qwen3ForCausalLM"], "qwen3", "float32")
    again = transformers.Qwen3Config.from_dict(kept)
    assert again.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {
        "dtype": None, "architectures": ["Qwen3ForCausalLM"]
    }  # fmt: skip
    assert all(str(tmp_path) not in data.decode("latin1") for data in contents(tmp_path / "one").values())


REFUSALS = """
import sys, warnings
if sys.argv[1] == "without":
    sys.modules["peft"] = None
warnings.simplefilter("ignore")
import transformers
from transformers.utils import is_peft_available
assert is_peft_available() == (sys.argv[1] == "with")
classes = ["AutoConfig", "AutoModelForCausalLM", "Qwen3ForCausalLM", "BertModel", "T5ForConditionalGeneration",
           "CLIPModel", "ResNetModel"]
for name in classes:
    for options in ({}, {"attn_implementation": "eager"}):
        try:
            getattr(transformers, name).from_pretrained(sys.argv[2], **options)
        except Exception as error:
            assert "sspace" in str(error), (name, str(error))
        else:
            raise SystemExit(f"{name} loaded it")
"""


@pytest.mark.parametrize("peft", ["with", "without"])
def test_every_class_of_transformers_refuses_the_folder(peft, tmp_path):
    trained().save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", REFUSALS, peft, str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_values_of_a_state_dict_are_saved(tmp_path):
    model = trained()
    averaged = {k: v * 0.5 if "core" in k or k in BESIDE else v for k, v in values(model).items()}
    model.save_pretrained(tmp_path / "one", state_dict=averaged)
    fresh = load_adapter(base(), tmp_path / "one", progress=False)
    assert_same(values(fresh), averaged)
    assert torch.equal(load_file(tmp_path / "one" / CHECKPOINT)["lm_head.weight"], averaged["lm_head.weight"])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.sspace.core.g"])
def test_a_state_dict_that_lacks_what_was_trained_is_refused(name, tmp_path):
    model = trained()
    with pytest.raises(surgery.AdapterError, match=f"state_dict has no '{name}'"):
        model.save_pretrained(tmp_path / "one", state_dict={k: v for k, v in values(model).items() if k != name})
    assert not (tmp_path / "one").exists()


def test_a_state_dict_with_another_base_is_refused(tmp_path):
    model = trained()
    other = values(model)
    other["model.embed_tokens.weight"] += 1
    with pytest.raises(surgery.AdapterError, match=r"'model\.embed_tokens\.weight', which is frozen"):
        model.save_pretrained(tmp_path / "one", state_dict=other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"safe_serialization": False}, "safe_serialization=False"),
        ({"variant": "fp16"}, "variant='fp16'"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True"),
        ({"save_peft_format": False}, "save_peft_format=False"),
        ({"max_shard_size": "1KB"}, "max_shard_size allows 1,000"),
        ({"max_shard_size": "many"}, "max_shard_size must be"),
        ({"repo_id": "one/two"}, "push_to_hub=True"),
        ({"create_pr": True}, "'create_pr'"),
    ],
)
def test_what_has_no_meaning_for_an_adapter_is_refused_by_name(options, said, tmp_path):
    with pytest.raises(surgery.AdapterError, match=said):
        trained().save_pretrained(tmp_path / "one", **options)
    assert not (tmp_path / "one").exists()


def test_arguments_that_change_nothing_are_accepted(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "one")
    options = {"safe_serialization": True, "max_shard_size": "5GB", "variant": None, "save_original_format": False}
    model.save_pretrained(tmp_path / "two", True, None, False, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    model.save_pretrained(tmp_path / "three", is_main_process=False)
    assert not (tmp_path / "three").exists()


def test_a_push_sends_the_adapter(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "surgery.verbs.save_pretrained.push_adapter", lambda *args, **kwargs: sent.append((args, kwargs))
    )
    trained().save_pretrained(tmp_path / "one", push_to_hub=True, private=True, commit_message="first")
    assert sent == [((tmp_path / "one", "one"), {"private": True, "message": "first"})]


def test_the_folder_of_the_base_is_not_overwritten(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = contents(tmp_path / "base")
    apply_surgery(model, "antipasto", r=4, progress=False)
    with pytest.raises(surgery.AdapterError, match="is the folder of the base model"):
        model.save_pretrained(tmp_path / "base")
    assert contents(tmp_path / "base") == before


def test_merged_and_undone_models_are_saved_by_transformers(tmp_path):
    model = trained()
    expected = logits(model)
    merge(model).save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded), expected, atol=1e-4)
    assert torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_on_a_model_whose_head_is_frozen_is_saved_whole_again(tmp_path):
    model, fresh = trained(), base()
    model.save_pretrained(tmp_path / "one")
    apply_surgery(fresh, "antipasto", r=8, progress=False)  # whose user forgot to unfreeze the head
    found = fresh.load_state_dict(load_file(tmp_path / "one" / CHECKPOINT), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    fresh.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(load_adapter(base(), tmp_path / "two", progress=False)), logits(model))


def test_what_a_checkpoint_lacks_is_missing(tmp_path):
    model = apply_surgery(base(), "antipasto", r=8, progress=False)
    model.save_pretrained(tmp_path)
    more = operated()
    assert sorted(more.load_state_dict(load_file(tmp_path / CHECKPOINT), strict=False).missing_keys) == BESIDE
    partial = {"model.embed_tokens.weight": more.model.embed_tokens.weight.detach()}
    assert len(more.load_state_dict(partial, strict=False).missing_keys) > 30  # of anything else, all are told


def test_a_coefficient_is_kept_in_the_header_and_said(tmp_path):
    model = trained()
    expected = logits(model)
    set_coeff(model, torch.tensor([0.5, -1.0]))
    with pytest.warns(UserWarning, match="coeff was not one number for all rows"):
        model.save_pretrained(tmp_path)
    assert configuration(tmp_path)["coeff"] == [0.5, -1.0]
    with pytest.warns(UserWarning, match="loading sets coeff to 1"):
        fresh = load_adapter(base(), tmp_path, progress=False)
    assert torch.equal(logits(fresh), expected)


def test_an_adapter_over_a_checkpoint_leaves_no_other_checkpoint(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_adapter(model, tmp_path)
    assert torch.equal(load_file(tmp_path / CHECKPOINT)["lm_head.weight"], model.lm_head.weight)
    assert json.loads((tmp_path / HUB_CONFIG).read_text())["model_type"] == "sspace_adapter"
