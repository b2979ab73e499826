"""What was trained beside the cores leaves PyTorch with them: dense weights, LoRA, checkpoints, programs and cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import surgery
from exporters import export, export_core, merge_checkpoint, swap
from surgery import apply_surgery, load_adapter, save_adapter
from tests.support.operated_models import randomise
from tests.support.tolerance import assert_close
from tests.support.trainer_runs import base, logits, operated

BODY = "model.layers.0.mlp.up_proj"


def trained(*names: str, tie: bool = False, model: Any = None) -> Any:
    model = base(tie=tie) if model is None else model
    randomise(apply_surgery(model, "antipasto", r=4, progress=False), 0.3)
    for name in names:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.2)
    return model


def loaded_in_peft(path: Path, model: nn.Module) -> Any:
    return peft.PeftModel.from_pretrained(model, path).eval()


@pytest.mark.parametrize(
    ("names", "modules", "tie"),
    [
        (["lm_head.weight", "model.norm.weight"], ["lm_head", "model.norm"], False),
        (["model.embed_tokens.weight"], ["lm_head", "model.embed_tokens"], True),
    ],
)
def test_peft_saves_whole_modules(names, modules, tie, tmp_path):
    model = trained(*names, tie=tie)
    report = export(model, "lora", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"] == modules
    assert set(names) <= set(report.details["beside"])
    wrapped = loaded_in_peft(tmp_path / "lora", base(tie=tie))
    assert_close(logits(wrapped), logits(model), torch.float32)
    assert_close(logits(wrapped.merge_and_unload()), logits(model), torch.float32)


def biased() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config).eval()


def test_peft_saves_a_new_head_and_the_biases_of_sites(tmp_path):
    names = ["classifier.weight", "bert.encoder.layer.0.intermediate.dense.bias"]
    model = biased()
    apply_surgery(model, "antipasto", r=4, target_modules=["query", "intermediate.dense"], progress=False)
    randomise(model, 0.3)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
        with torch.no_grad():
            model.get_parameter(name).add_(0.5)
    export(model, "lora", tmp_path / "lora")
    assert_close(logits(loaded_in_peft(tmp_path / "lora", biased())), logits(model), torch.float32)


def test_what_peft_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(surgery.ExportError, match=rf"'{BODY}\.weight': it is the weight that PEFT adds"):
        export(trained(f"{BODY}.weight"), "lora", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_dense_weights_have_it(tmp_path):
    model = trained("lm_head.weight", "model.norm.weight", f"{BODY}.weight")
    export(model, "dense", tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert_close(logits(plain), logits(model), torch.float32)


@pytest.mark.parametrize("tie", [False, True])
def test_a_merged_checkpoint_has_it(tie, tmp_path):
    base(tie=tie).save_pretrained(tmp_path / "base")
    model = trained("model.embed_tokens.weight", "model.norm.weight", f"{BODY}.weight", tie=tie)
    save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert_close(logits(merged), logits(model), torch.float32)


def test_a_checkpoint_without_a_place_for_it_is_refused(tmp_path):
    model = trained()
    model.extra = nn.Linear(2, 2)
    base().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "extra")
    with pytest.raises(surgery.ExportError, match=r"'extra\.weight' was trained beside the cores"):
        merge_checkpoint(tmp_path / "base", tmp_path / "extra", tmp_path / "out", progress=False)
    wide = base()
    wide.resize_token_embeddings(70)
    save_adapter(trained("model.embed_tokens.weight", model=wide), tmp_path / "rows")
    with pytest.raises(surgery.ExportError, match=r"as F32 \[70, 32\], and the checkpoint has it as"):
        merge_checkpoint(tmp_path / "base", tmp_path / "rows", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_new_token_rows_need_a_model_with_as_many(tmp_path):
    wide = base()
    wide.resize_token_embeddings(70, mean_resizing=False)
    model = trained("model.embed_tokens.weight", "lm_head.weight", model=wide)
    save_adapter(model, tmp_path)
    fresh = base()
    with pytest.raises(surgery.AdapterError, match=r"call model\.resize_token_embeddings\(70\) before load_adapter"):
        load_adapter(fresh, tmp_path, progress=False)
    fresh.resize_token_embeddings(70)
    assert torch.equal(logits(load_adapter(fresh, tmp_path, progress=False)), logits(model))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x))


def small(*names: str) -> Any:
    torch.manual_seed(0)
    model = apply_surgery(Small().eval(), "antipasto", r=4, example_inputs=torch.ones(2, 8), progress=False)
    randomise(model, 0.3)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
        with torch.no_grad():
            model.get_parameter(name).add_(0.5)
    return model


def test_a_core_is_not_swapped_into_a_program_with_other_values_beside_it(tmp_path):
    x = torch.randn(2, 8)
    one, other = small("norm.bias"), small()
    export(one, "pt2", tmp_path / "one.pt2", example_inputs=x, mode="live")
    program = torch.export.load(tmp_path / "one.pt2")
    assert_close(program.module()(x), one(x), torch.float32)
    swap(program, one)
    for adapter in (other, save_adapter(other, tmp_path / "other")):
        with pytest.raises(surgery.AdapterError, match=r"'norm\.bias' was trained beside the cores"):
            swap(program, adapter)
    swap(program, save_adapter(one, tmp_path / "same"))


def test_a_core_file_belongs_to_what_was_trained_beside_it(tmp_path):
    x = torch.randn(2, 8)
    one, other = small("norm.bias"), small()
    export(one, "onnx", tmp_path / "one.onnx", example_inputs=x, mode="swappable")
    export_core(one, tmp_path / "one.onnx_adapter", onnx_path=tmp_path / "one.onnx")
    with pytest.raises(surgery.ExportError, match="does not fit"):
        export_core(other, tmp_path / "other.onnx_adapter", onnx_path=tmp_path / "one.onnx")


def test_files_of_a_trainer_load_in_peft_and_as_adapter_alike(tmp_path):
    model = operated()
    randomise(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    fresh = load_adapter(base(), tmp_path / "adapter", progress=False)
    export(fresh, "lora", tmp_path / "lora")
    assert {n for n in load_file(tmp_path / "lora" / "adapter_model.safetensors") if "lora_" not in n} == {
        "base_model.model.lm_head.weight", "base_model.model.model.norm.weight",
    }  # fmt: skip
    assert_close(logits(loaded_in_peft(tmp_path / "lora", base())), logits(model), torch.float32)
