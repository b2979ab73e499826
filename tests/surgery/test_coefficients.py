"""Coefficients by row and by token: as one by one, whatever the cache, beams or chunks; and refused where unclear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache, T5Config, T5ForConditionalGeneration

import surgery
from passes.infra.tolerance import disagreement
from surgery import disable_adapter, get_coeff, get_scale, set_coeff, set_scale, sites, steer


def shaken(model: nn.Module, **options: Any) -> Any:
    surgery.apply_surgery(model, "antipasto", r=6, progress=False, **options)
    with torch.no_grad():
        for i, site in enumerate(sites(model).values()):
            site.core.g.copy_(torch.linspace(-0.6, 0.9, len(site.core.g)).roll(i))
    return model


@pytest.fixture(scope="module")
def causal() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    return shaken(Qwen3ForCausalLM(config).eval())


@pytest.fixture(scope="module")
def seq2seq() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return shaken(T5ForConditionalGeneration(config).eval())


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(8, 64, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def reference(model: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Each row by itself, with the gains of each position formed in the forward of every site, in float64."""
    wide = copy.deepcopy(model).double()
    for site in sites(wide).values():
        U, S, Vh, g, owner = (*(getattr(site.factors, n) for n in ("U", "S", "Vh")), site.core.g, site.host.owner)

        weight = owner._parameters["weight"]  # while the model runs, owner.weight has the adapter's change

        def forward(
            x: torch.Tensor, U: Any = U, S: Any = S, Vh: Any = Vh, g: Any = g, weight: Any = weight, owner: Any = owner
        ) -> Any:
            coeff = tokens.double()[:, : x.shape[1], None]
            d = (x @ Vh.T) * S * torch.nn.functional.elu(coeff * g)
            return torch.nn.functional.linear(x, weight, owner.bias) + d @ U.T

        vars(owner)["forward"] = forward
    with torch.no_grad():
        return wide(x).logits.float()


@torch.no_grad()
def test_every_token_has_its_own_coefficient(causal: Any) -> None:
    x, tokens = ids(3, 7), torch.linspace(-1, 1.5, 21).reshape(3, 7)
    with steer(causal, tokens):
        found = causal(x).logits
        assert torch.equal(get_coeff(causal), tokens)
    assert disagreement(found, reference(causal, x, tokens)) is None
    assert get_coeff(causal) == 1.0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_tokens_follow_a_cache_in_chunks(causal: Any, cache: str) -> None:
    x, tokens = ids(2, 9), torch.linspace(-1, 1.5, 18).reshape(2, 9)
    with steer(causal, tokens):
        whole = causal(x).logits
        held = DynamicCache() if cache == "dynamic" else StaticCache(config=causal.config, max_cache_len=16)
        parts = [
            causal(x[:, a:b], past_key_values=held, use_cache=True).logits for a, b in ((0, 4), (4, 6), (6, 7), (7, 9))
        ]
    assert disagreement(torch.cat(parts, 1), whole) is None


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}]
)
@torch.no_grad()
def test_generation_gives_the_tokens_of_the_run_without_a_cache(causal: Any, options: dict[str, Any]) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    x, tokens = ids(rows, 6), torch.linspace(-1, 1.5, rows * 6).reshape(rows, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with steer(causal, tokens, beyond=0.5):
        found = causal.generate(x, **settings)
        plain = (
            causal.generate(x, **{**settings, "use_cache": False, "cache_implementation": None})
            if "static" in str(options)
            else causal.generate(x, **{n: v for n, v in settings.items() if "lookup" not in n}, use_cache=False)
        )
    assert torch.equal(found, plain)


@torch.no_grad()
def test_a_call_beyond_the_last_column_needs_a_value(causal: Any) -> None:
    x, tokens = ids(2, 5), torch.full((2, 3), 0.5)
    with steer(causal, tokens), pytest.raises(surgery.InputError, match="beyond="):
        causal(x)
    with steer(causal, tokens, beyond=0.5):
        found = causal(x).logits
    with steer(causal, 0.5):
        assert disagreement(found, causal(x).logits) is None


@torch.no_grad()
def test_beams_repeat_rows_and_guidance_tiles_them(causal: Any) -> None:
    x, rows = ids(2, 5), torch.tensor([0.4, -0.8])
    with steer(causal, rows):
        one = causal(x).logits
        with pytest.raises(surgery.InputError, match=r"rows='repeat'.*rows='tile'"):
            causal(x.repeat_interleave(3, 0))
    with steer(causal, rows, rows="repeat"):
        assert disagreement(causal(x.repeat_interleave(3, 0)).logits, one.repeat_interleave(3, 0)) is None
    with steer(causal, rows, rows="tile"):
        assert disagreement(causal(x.repeat(3, 1)).logits, one.repeat(3, 1, 1)) is None
    with steer(causal, rows):  # inside of generate the expansion is known
        beams = causal.generate(x, num_beams=3, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for i, coeff in enumerate(rows):
        with steer(causal, coeff):
            alone = causal.generate(x[i : i + 1], num_beams=3, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(beams[i, : alone.shape[1]], alone[0])


@torch.no_grad()
def test_two_sequences_have_coefficients_of_their_own(seq2seq: Any) -> None:
    encoder, decoder = ids(2, 6), ids(2, 4)
    with pytest.raises(surgery.InputError, match="two sequences"):
        set_coeff(seq2seq, torch.ones(2, 6))
    tokens = {"input_ids": torch.zeros(2, 6), "decoder_input_ids": torch.full((2, 4), 0.7)}
    with steer(seq2seq, tokens=tokens):
        found = seq2seq(input_ids=encoder, decoder_input_ids=decoder).logits
        assert get_coeff(seq2seq).keys() == tokens.keys()
    with disable_adapter(seq2seq):
        states = seq2seq.encoder(encoder)
    streams = {key: site.stream for key, site in sites(seq2seq).items()}
    assert all(stream == (key.startswith("encoder") or "EncDecAttention.k" in key or "EncDecAttention.v" in key)
               for key, stream in streams.items())  # fmt: skip
    model = copy.deepcopy(seq2seq)
    for key, site in sites(model).items():
        if streams[key]:
            nn.init.zeros_(site.core.g)
    with steer(model, 0.7):
        expected = model(encoder_outputs=states, decoder_input_ids=decoder).logits
    assert disagreement(found, expected) is None


def test_sites_without_the_positions_are_named() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x)[:, 0])

    x = torch.randn(3, 5, 8)
    model = shaken(Pooled().eval(), example_inputs=x, target_modules=["inner", "head"])
    with steer(model, torch.ones(3, 5)), pytest.raises(surgery.InputError, match=r"'head'.*exclude_modules"):
        model(x)


def test_scales_multiply_and_last(tmp_path: Any) -> None:
    x = torch.randn(3, 8)
    model = shaken(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval(), target_modules=["0", "2"])
    with torch.no_grad():
        with steer(model, 0.5):
            halved = model(x)
        assert set_scale(model, {"0": 0.5, "2": 0.5}) is model
        assert get_scale(model) == {"0": 0.5, "2": 0.5}
        assert disagreement(model(x), halved) is None
        assert "scale=0.5" in repr(sites(model)["0"])
        for bad in ({"0": float("nan")}, {"0": "a"}):
            with pytest.raises(surgery.InputError):
                set_scale(model, bad)
        with pytest.raises(surgery.TargetError):
            set_scale(model, {"nothing": 1.0})
        merged = surgery.merge(copy.deepcopy(model))
        assert disagreement(merged(x), halved) is None
        base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
        base.load_state_dict(surgery.undo_surgery(copy.deepcopy(model)).state_dict())
        surgery.save_adapter(model, tmp_path / "a")
        loaded = surgery.load_adapter(base, tmp_path / "a")
        assert get_scale(loaded) == {"0": 0.5, "2": 0.5}
        assert torch.equal(loaded(x), model(x))
