"""ONNX with a key/value cache: greedy generation in ONNX Runtime against PyTorch's generate, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from exporters import ExportError, export, export_core
from surgery import apply_surgery, sites, steer
from tests.support.onnx_models import operated, session
from tests.support.shared_exports import SharedExports
from tests.support.swappable_models import train
from tests.support.zoo import HUB, SmallModel, built_once, full, small_model

TOKENS = 8


def gemma3() -> nn.Module:
    import transformers as t

    config = t.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
    )  # fmt: skip
    return t.Gemma3ForCausalLM(config)


def opt() -> nn.Module:
    import transformers as t

    config = t.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return t.OPTForCausalLM(config)


def gpt_neox() -> nn.Module:
    import transformers as t

    config = t.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return t.GPTNeoXForCausalLM(config)


def bloom() -> nn.Module:
    import transformers as t

    return t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


MORE = {build.__name__: build for build in (gemma3, opt, gpt_neox, bloom)}


@built_once
def language_model(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> SmallModel:
    """A causal model whose logits differ between tokens, operated on, without an end of sequence."""
    if name in HUB:
        p = small_model(name, dtype, **sizes)
    else:
        torch.manual_seed(0)
        p = SmallModel(name, MORE[name]().to(dtype).eval(), {"input_ids": torch.randint(0, 64, (2, 7))})
        p.inputs["attention_mask"] = torch.ones_like(p.inputs["input_ids"])
    with torch.no_grad():
        for parameter in p.model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    p.model.generation_config.eos_token_id = None
    p.model.generation_config.pad_token_id = 0
    apply_surgery(p.model, "antipasto", r=6, progress=False)
    train(p.model, 1)
    return p


def prompt(rows: int, length: int, padded: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(10 * rows + length))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def in_pytorch(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[:, inputs["input_ids"].shape[1] :]


def in_onnxruntime(
    path: Path, inputs: dict[str, torch.Tensor], core: Path | None = None, **coefficient: np.ndarray
) -> torch.Tensor:
    """Greedy generation with nothing but ONNX Runtime and numpy."""
    running = session(path)
    options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if core is not None:
        adapter.Load(str(core))
        options.add_active_adapter(adapter)
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {
        v.name: np.zeros((len(ids), v.shape[1], 0, v.shape[3]), kinds[v.type])
        for v in running.get_inputs()
        if v.name.startswith("past_key_values.")
    }
    names = [value.name for value in running.get_inputs()]
    made = []
    for _ in range(TOKENS):
        feed = {"input_ids": ids, "attention_mask": mask, **cache, **coefficient}
        if "position_ids" in names:
            feed["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        out = dict(zip((v.name for v in running.get_outputs()), running.run(None, feed, options), strict=True))
        ids = out["logits"][:, -1].argmax(axis=-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        cache = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
        made.append(ids)
    return torch.from_numpy(np.concatenate(made, axis=1))


@pytest.mark.parametrize("name", ["qwen3", "bloom", *full("gpt2", "gemma3", "llama", "opt", "gpt_neox")])
def test_generation_is_pytorchs_token_for_token(name: str, exported: SharedExports) -> None:
    p, report = exported(language_model, name, "live", use_cache=True)
    assert report.max_error < 1e-5
    assert report.details["tokens"] > 0
    seen = set()
    for coeff in (1.0, 0.0, -1.0):
        for inputs in (prompt(1, 1), prompt(1, 9), prompt(3, 6), prompt(2, 6, padded=3)):
            with steer(p.model, coeff):
                expected = in_pytorch(p.model, inputs)
            assert torch.equal(in_onnxruntime(report.path, inputs, coeff=np.array(coeff, np.float32)), expected)
            seen.add((coeff, tuple(expected.flatten().tolist())))
    assert len({tokens for _, tokens in seen}) > 4  # coeff and prompt matter


@pytest.mark.parametrize("name", ["qwen3", *full("gpt2")])
def test_rows_are_steered_apart_while_generating(name: str, exported: SharedExports) -> None:
    p, report = exported(language_model, name, "live", use_cache=True)
    path = report.path
    inputs, rows = prompt(3, 5), torch.tensor([1.0, 0.0, -1.0])
    with steer(p.model, rows):
        expected = in_pytorch(p.model, inputs)
    assert torch.equal(in_onnxruntime(path, inputs, coeff=rows.numpy()), expected)


def test_merged_generates_and_has_the_names_of_the_ecosystem(tmp_path: Path) -> None:
    p = language_model("qwen3", layers=1)
    path = export(p.model, "onnx", tmp_path / "m.onnx", use_cache=True, example_inputs=p.inputs).path
    inputs = prompt(2, 6)
    assert torch.equal(in_onnxruntime(path, inputs), in_pytorch(p.model, inputs))
    running = session(path)
    past, total = "past_sequence", "past_sequence + sequence"
    assert [(v.name, v.shape) for v in running.get_inputs()] == [
        ("input_ids", ["batch", "sequence"]),
        ("attention_mask", ["batch", total]),
        ("position_ids", ["batch", "sequence"]),
        *((f"past_key_values.0.{n}", ["batch", 2, past, 8]) for n in ("key", "value")),
    ]
    names = ["logits", *(f"present.0.{n}" for n in ("key", "value"))]
    assert [v.name for v in running.get_outputs()] == names
    assert running.get_outputs()[0].shape[:2] == ["batch", "sequence"]


def test_cores_are_swapped_while_generating(tmp_path: Path) -> None:
    p = language_model("llama", layers=1)
    path = export(p.model, "onnx", tmp_path / "m.onnx", mode="swappable", use_cache=True, example_inputs=p.inputs).path
    inputs, results = prompt(2, 6), []
    for seed in (2, 3):
        train(p.model, seed)
        core = export_core(p.model, tmp_path / f"{seed}.onnx_adapter", onnx_path=path).path
        results.append(in_pytorch(p.model, inputs))
        assert torch.equal(in_onnxruntime(path, inputs, core), results[-1])
    assert not torch.equal(*results)


@pytest.mark.full
def test_float16_and_default_inputs(tmp_path: Path) -> None:
    p = language_model("qwen3", torch.float16, layers=1)
    report = export(p.model, "onnx", tmp_path / "m.onnx", use_cache=True)
    assert report.max_error < 2e-2
    assert {v.type for v in session(report.path).get_inputs()} == {"tensor(int64)", "tensor(float16)"}


@pytest.mark.full
def test_two_exports_are_byte_identical(tmp_path: Path) -> None:
    p = language_model("gpt2")
    data = [
        export(p.model, "onnx", tmp_path / f"{i}.onnx", mode="live", use_cache=True).path.read_bytes() for i in range(2)
    ]
    assert data[0] == data[1]
    assert b"site-packages" not in data[0]


def test_refusals(tmp_path: Path) -> None:
    for name in ("mlp", "bert", "t5"):
        p = operated(name)
        with pytest.raises(ExportError, match=r"use_cache=True|no cache|caches other"):
            export(p.model, "onnx", tmp_path / "m.onnx", use_cache=True, example_inputs=p.inputs)
    p = language_model("qwen3")
    inputs = p.inputs | {"inputs_embeds": torch.randn(2, 7, 32)}
    del inputs["input_ids"]
    with pytest.raises(ExportError, match="remove inputs_embeds"):
        export(p.model, "onnx", tmp_path / "m.onnx", use_cache=True, example_inputs=inputs)
    assert list(tmp_path.iterdir()) == []
    assert sites(p.model)
