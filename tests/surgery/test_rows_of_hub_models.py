"""A coefficient by row on models of transformers that transpose, flatten, cut, pack or route what their rows hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import surgery
from passes.infra.tolerance import disagreement
from surgery import get_coeff, set_coeff, sites, steer
from tests.support.row_models import one_by_one, shaken

COEFFS = torch.tensor([-0.7, 1.0, 0.4])
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TALL: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
HEADS = {
    f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 48))
}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def ids(length: int, rows: int = 3) -> torch.Tensor:
    return torch.randint(8, 64, (rows, length), generator=torch.Generator().manual_seed(length))


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return t.GPT2LMHeadModel(config), {"input_ids": ids(3)}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    model = t.T5ForConditionalGeneration(t.T5Config(**T5, decoder_start_token_id=0))
    return model, {"input_ids": ids(7), "decoder_input_ids": ids(4)}


def labelled() -> tuple[nn.Module, dict[str, Any]]:
    return t5()[0], {"input_ids": ids(7), "labels": ids(4)}


def swin() -> tuple[nn.Module, dict[str, Any]]:
    config = t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return t.SwinModel(config), {"pixel_values": images}


def longformer() -> tuple[nn.Module, dict[str, Any]]:
    config = t.LongformerConfig(**SIZES, num_attention_heads=4, attention_window=4, max_position_embeddings=80)
    looks = torch.zeros(3, 8, dtype=torch.long)
    looks[:, 0] = 1
    return t.LongformerModel(config), {"input_ids": ids(8), "global_attention_mask": looks}


def led() -> tuple[nn.Module, dict[str, Any]]:
    places = {f"max_{part}_position_embeddings": 80 for part in ("encoder", "decoder")}
    model = t.LEDModel(t.LEDConfig(**TALL, **HEADS, **places, attention_window=4))
    return model, {"input_ids": ids(8), "decoder_input_ids": ids(5)}


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = t.MixtralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    model = t.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the only one for float64
    return model, {"input_ids": ids(6)}


def nllb_moe() -> tuple[nn.Module, dict[str, Any]]:
    steps = {f"{part}_sparse_step": 2 for part in ("encoder", "decoder")}
    config = t.NllbMoeConfig(**TALL, **HEADS, **steps, num_experts=4, init_std=0.2)
    return t.NllbMoeModel(config), {"input_ids": ids(8), "decoder_input_ids": ids(5)}


def switch() -> tuple[nn.Module, dict[str, Any]]:
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
    model = t.SwitchTransformersForConditionalGeneration(
        t.SwitchTransformersConfig(**T5, **sparse, decoder_start_token_id=0)
    )
    return model, {"input_ids": ids(8), "decoder_input_ids": ids(5)}


SLOW = pytest.mark.full
EXPERTS = r".*(experts|router).*"
WEIGHTS = r".*(experts|mlp\.gate).*"  # of Mixtral, which are read without a call
RIGHT = [
    (gpt2, None),
    pytest.param(t5, None, marks=SLOW),
    pytest.param(labelled, None, marks=SLOW),
    (swin, None),
    (longformer, None),
    pytest.param(led, None, marks=SLOW),
    (mixtral, WEIGHTS),
    pytest.param(nllb_moe, EXPERTS, marks=SLOW),
    pytest.param(switch, EXPERTS, marks=SLOW),
]


def made(
    build: Callable[[], tuple[nn.Module, dict[str, Any]]], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, call = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that tokens differ
    call = {name: value.to(dtype) if value.is_floating_point() else value for name, value in call.items()}
    return shaken(model.eval().to(dtype), **options), call


def output(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    found = model(**call)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize(("build", "left_out"), RIGHT)
@torch.no_grad()
def test_every_row_is_that_of_its_own_coefficient(build: Any, left_out: str | None) -> None:
    model, call = made(build, torch.float64, exclude_modules=left_out)
    with steer(model, COEFFS):
        found = output(model, call).float()
    assert disagreement(found, one_by_one(model, COEFFS, lambda m: output(m, call))) is None
    with steer(model, 0.3):
        assert disagreement(found, output(model, call).float()) is not None


@pytest.mark.parametrize("build", [pytest.param(nllb_moe, marks=SLOW), switch])
def test_called_experts_are_refused_when_rows_are_set(build: Any) -> None:
    model, call = made(build)
    set_coeff(model, 0.5)
    with pytest.raises(surgery.SurgeryError, match=r"site '\S*experts\S*': its input.*exclude_modules.*scalar coeff"):
        set_coeff(model, COEFFS)
    assert get_coeff(model) == 0.5
    with torch.no_grad():
        assert output(model, call).isfinite().all()


@torch.no_grad()
def test_beams_of_a_model_whose_encoder_is_called_by_itself() -> None:
    model, call = made(t5)
    x, two = call["input_ids"][:2], COEFFS[:2]
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with steer(model, two):
        beams = model.generate(x, **options)
    for i, coeff in enumerate(two.tolist()):
        with steer(model, coeff):
            alone = model.generate(x[i : i + 1], **options)
        assert torch.equal(beams[i, : alone.shape[1]], alone[0])


def packed_images() -> tuple[nn.Module, dict[str, Any]]:
    """Two images of unlike size, whose patches are one sequence."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = SIZES | {"vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    names = {"image": 120, "video": 121, "vision_start": 118, "vision_end": 119}
    config = t.Qwen2VLConfig(
        text_config=text, vision_config=vision, **{f"{name}_token_id": token for name, token in names.items()}
    )
    row = [[10, 118, *[120] * n, 119, 20, 30, 40, *[7] * (6 - n)] for n in (4, 6)]
    tokens = torch.tensor(row)
    patches = torch.randn(4 * 4 + 4 * 6, 3 * 2 * 16, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]])
    call = {
        "input_ids": tokens,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": (tokens == 120).int(),
    }
    return t.Qwen2VLForConditionalGeneration(config), call


@pytest.mark.full
@torch.no_grad()
def test_packed_images_are_refused_and_the_text_is_steered() -> None:
    _, call = made(packed_images)
    model, _ = made(packed_images, example_inputs=call)
    assert any("visual" in key for key in sites(model))
    with pytest.raises(surgery.SurgeryError, match=r"site '\S*visual\S*': .*exclude_modules"), steer(model, COEFFS[:2]):
        output(model, call)
    model, _ = made(packed_images, example_inputs=call, exclude_modules=r".*visual.*")
    with steer(model, COEFFS[:2]):
        found = output(model, call)
    for i, coeff in enumerate(COEFFS[:2].tolist()):
        with steer(model, coeff):
            assert disagreement(found[i], output(model, call)[i]) is None
