"""Which entries are tokens and which are padding: masks, pooling by row, and what cannot be told apart."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from surgery import Contrast, inspect_sites
from surgery.planning.calibration_run import collect
from tests.support.calibration_inputs import check_moment, padded, quietly, text
from tests.support.hooked_inputs import hooked
from tests.support.injected_failures import refused
from tests.support.tolerance import assert_close
from tests.support.zoo import small_model

TEXT = ("qwen3", "gpt2", "bert")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_moments_of_every_site_without_padding(name, side):
    model = small_model(name).model
    batches = [
        {"input_ids": text(seed=1), "attention_mask": padded(side)},
        {"input_ids": text(2, 5), "attention_mask": torch.ones(2, 5)},
    ]
    found = quietly(model, batches)
    assert len(found.sites) >= 8
    for key, statistic in found.sites.items():
        tokens = []
        for batch in batches:
            for x in hooked(model, [key], batch)[key]:
                tokens.append(x[batch["attention_mask"].bool()] if x.dim() == 3 else x)
        check_moment(model, key, statistic, torch.cat(tokens))


def test_an_encoder_and_a_decoder_have_a_mask_each():
    model = small_model("t5").model
    batch = {"input_ids": text(3, 8), "attention_mask": padded("right")}
    batch |= {"decoder_input_ids": text(3, 5), "decoder_attention_mask": padded("right", 3, 5)}
    found = quietly(model, [batch])
    for key, statistic in found.sites.items():
        inputs = hooked(model, [key], batch)[key]
        mask = batch["decoder_attention_mask" if inputs[0].shape[1] == 5 else "attention_mask"].bool()
        check_moment(model, key, statistic, torch.cat([x[mask] for x in inputs]))


@pytest.mark.parametrize("mask", [None, padded("left", 3, 8)])
def test_masks_that_cannot_be_told_apart_are_refused(mask):
    batch = {"input_ids": text(), "attention_mask": padded("right"), "decoder_input_ids": text(seed=2)}
    batch |= {} if mask is None else {"decoder_attention_mask": mask}
    assert "two attention masks of the same shape differ" in refused(small_model("t5").model, calibration=[batch], r=4)


class Padded(nn.Module):
    """Self-attention that passes the padding on; its inputs are as the attention wants them."""

    def __init__(self, batch_first: bool, need_weights: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.mha(x, x, x, key_padding_mask=attention_mask == 0, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [3, 5])
def test_attention_with_padding(length, batch_first, need_weights):
    model, mask = Padded(batch_first, need_weights).eval(), padded("left", 3, length)
    x = torch.randn(3, length, 16)
    given_x = x if batch_first else x.transpose(0, 1)
    found = quietly(model, [{"x": given_x, "attention_mask": mask}], r=2)
    plain = Padded(batch_first, need_weights).double().eval()  # an output projection that does nothing shows its input
    plain.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    with torch.no_grad():
        plain.mha.out_proj.weight.copy_(torch.eye(16))
        plain.mha.out_proj.bias.zero_()
        mixed = plain(given_x.double(), mask)
    mixed = mixed if batch_first else mixed.transpose(0, 1)
    check_moment(model, "mha.in_proj_weight", found.sites["mha.in_proj_weight"], x[mask.bool()])
    check_moment(model, "mha.out_proj", found.sites["mha.out_proj"], mixed[mask.bool()], torch.float32)
    contrast = Contrast(*[[{"x": given_x * sign, "attention_mask": mask}] for sign in (1, 0.5)])
    sites = inspect_sites(model, {"x": given_x, "attention_mask": mask}).sites
    kinds = {site.key: "contrast" for site in sites}
    statistic = collect(model, sites, (), kinds, contrast).sites["mha.out_proj"]
    last = torch.tensor([length - 1] * 3)
    assert_close(statistic.mean("positive"), mixed[torch.arange(3), last].mean(0), torch.float32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["last", "mean", "all"])
def test_pooling_of_contrasts(pool, side):
    model, mask = small_model("qwen3").model, padded(side)
    batches = [{"input_ids": text(seed=seed), "attention_mask": mask} for seed in (1, 2, 3)]
    found = quietly(model, Contrast(batches[:2], iter(batches[2:]), pool), "sspace")
    assert found.pool == pool
    for key, statistic in found.sites.items():
        assert statistic.kind == "contrast"
        for name, part in (("positive", batches[:2]), ("negative", batches[2:])):
            rows = []
            for batch in part:
                for x, m in zip(hooked(model, [key], batch)[key][0].double(), mask.bool(), strict=True):
                    tokens = x[m]
                    rows.append({"last": tokens[-1:], "mean": tokens.mean(0, keepdim=True), "all": tokens}[pool])
            assert statistic.counts[name] == len(torch.cat(rows))
            assert_close(statistic.mean(name), torch.cat(rows).mean(0), torch.float32)


class Masked(nn.Module):
    """One product, of a module that does not look at the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
        return self.l(x)


@pytest.mark.parametrize("pool", ["last", "mean", "all"])
def test_what_stands_in_padding_does_not_matter(pool):
    x, mask = torch.randn(3, 8, 4), padded("right")
    spoiled = x.masked_fill(mask[:, :, None] == 0, float("nan"))
    sums = []
    for values in (x, spoiled):
        data = Contrast(*[[{"x": values + i, "attention_mask": mask}] for i in (0, 1)], pool)
        found = quietly(Masked(), data, "sspace", target_modules="all-linear", r=2)
        sums.append(found.sites["l"].sums["positive"])
    assert torch.equal(*sums)
    plain, other = (quietly(Masked(), [{"x": values, "attention_mask": mask}], r=2) for values in (x, spoiled))
    assert torch.equal(plain.sites["l"].sums["norm"], other.sites["l"].sums["norm"])


def test_rows_are_those_of_the_mask_whatever_comes_first():
    x, mask = torch.randn(5, 3, 4), padded("right", 3, 5)  # the sequence first
    data = Contrast([{"x": x, "attention_mask": mask}], [{"x": x + 1, "attention_mask": mask}])
    found = quietly(Masked(), data, "sspace", target_modules="all-linear", r=2).sites["l"]
    assert found.counts == {"positive": 3, "negative": 3}
    assert_close(found.sums["positive"], x[mask.sum(1) - 1, torch.arange(3)].double().sum(0))
    first = {"position_ids": torch.arange(5)[None], "x": x.transpose(0, 1)}
    found = quietly(Masked(), Contrast([first], [first | {"x": first["x"] + 1}]), "sspace", target_modules=["l"], r=2)
    assert_close(found.sites["l"].sums["positive"], x[-1].double().sum(0))


def test_two_dimensions_are_one_token_a_row():
    model, x = small_model("mlp").model, torch.randn(9, 12)
    found = quietly(model, Contrast([x], [x + 1]), "sspace", target_modules=["0"])
    assert found.sites["0"].counts == {"positive": 9, "negative": 9}
    assert_close(found.sites["0"].mean("positive"), x.double().mean(0))


def test_masks_that_hold_no_token_or_have_another_shape():
    mask = padded("left")
    mask[1] = 0
    batch = {"input_ids": text(), "attention_mask": mask}
    assert "row 1 of attention_mask is all padding" in refused(small_model("llama").model, calibration=[batch], r=4)
    batch["attention_mask"] = torch.ones(3, 1, 8, 8, dtype=torch.bool).tril()
    assert "attention_mask must be (batch, sequence)" in refused(small_model("llama").model, calibration=[batch], r=4)


def test_tokens_that_cannot_be_told_from_padding_are_warned_of():
    class Turned(Masked):
        def forward(self, x: torch.Tensor, attention_mask: Any = None, position_ids: Any = None) -> torch.Tensor:
            return self.l(x.flatten(0, 1)[:-1])

    with pytest.warns(UserWarning, match="cannot be told from padding.*: l"):
        found = quietly(Turned(), [{"x": torch.randn(3, 8, 4), "attention_mask": padded("left")}], r=2)
    assert found.sites["l"].tokens == 23
    with warnings.catch_warnings(action="error"):
        quietly(Masked(), [{"x": torch.randn(3, 8, 4), "attention_mask": padded("left")}], r=2)
