"""The report: every site and its cost, every other product and its reason."""

from __future__ import annotations

import io
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from surgery import InputError, apply_surgery, inspect_sites, load_adapter, report, save_adapter, sites
from surgery.support import progress_bar
from tests.support.operated_models import each_model, operated
from tests.support.zoo import small_model


@each_model
def test_report_has_every_site_and_every_other_product(name):
    model = operated(name).model
    found = report(model)
    assert found.model == type(small_model(name).model).__name__
    assert [site.key for site in found.sites] == list(sites(model))
    assert found.captured
    assert found.trainable == sum(site.trainable for site in found.sites)
    for row, site in zip(found.sites, sites(model).values(), strict=True):
        assert (row.d_out, row.d_in) == tuple(site.base_weight.matrix().shape)
        assert (row.variant, row.r, row.host) == ("antipasto", len(site.factors.S), site.host.name)
        assert row.base_macs == site.weight.numel()
        assert row.method == "gram"
        assert 0 < row.energy <= 1
        assert row.macs == (row.r * (row.d_in + row.d_out) if row.host == "module" else 0)
    inspected = {site.key for site in inspect_sites(model).sites}
    assert inspected == {row.key for row in found.sites} | {s.where for s in found.skipped} & inspected
    assert all(skipped.reason for skipped in found.skipped)


def test_report_as_text(capsys):
    found = small_model("qwen3")
    apply_surgery(found.model, "antipasto", r=4, target_modules=["q_proj", "lm_head"], progress=True)
    assert capsys.readouterr().out == ""  # a library call prints no table unasked
    text = str(report(found.model))
    report(found.model).show()
    assert capsys.readouterr().out.split() == text.split()
    assert "model.layers.*.self_attn.q_proj" in text
    assert "lm_head" in text
    assert "inference, training: the lowering at 512 tokens" in text
    assert "12 x linear: not selected" in text
    assert "sites from transformers.exporters" in text
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    text = str(report(apply_surgery(model, "antipasto", example_inputs=torch.randn(2, 4, 9), progress=False)))
    assert "1 x conv_transpose1d: conv_transpose1d with a parameter: a transposed convolution" in text


def test_report_of_a_loaded_adapter(tmp_path):
    expected = report(operated("raw").model)
    model = load_adapter(small_model("raw").model, save_adapter(operated("raw").model, tmp_path))
    found = report(model)
    assert found.how == "adapter file"
    assert not found.captured
    assert [(s.key, s.r, s.host, s.macs) for s in found.sites] == [(s.key, s.r, s.host, s.macs) for s in expected.sites]
    assert {site.method for site in found.sites} == {None}
    assert "loaded" in str(found)
    assert "sites from adapter file (not captured)" in str(found)


def test_report_in_a_notebook():
    found = small_model("qwen3")
    apply_surgery(found.model, "antipasto", r=4, target_modules=["q_proj"], progress=False)
    told = report(found.model)
    page = told._repr_html_()
    root = ElementTree.fromstring(page)  # well formed
    table = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert table[0] == ["site", "n", "out x in", "r", "inference", "training", "energy", "trainable"]
    assert table[1][:2] == ["model.layers.*.self_attn.q_proj", str(len(told.sites))]
    words = " ".join("".join(root.itertext()).split())
    lines = [line for line in str(told).splitlines() if line.startswith(("left alone", "factors", "low-rank"))]
    assert len(lines) > 2
    assert all(line in words for line in lines)


def test_names_in_a_notebook_are_escaped():
    model = nn.Sequential()
    model.add_module("a<b>&", nn.Linear(4, 4))
    told = report(apply_surgery(model, "antipasto", r=2, example_inputs=torch.ones(1, 4), progress=False))
    assert "a&lt;b&gt;&amp;" in told._repr_html_()
    assert "<b>&" not in told._repr_html_()


def test_repr_is_one_line():
    told = report(operated("mlp").model)
    assert repr(told).startswith(f"<Report: {told.model}, {len(told.sites)} sites (antipasto), {told.trainable:,} of ")
    assert "\n" not in repr(told)
    assert len(repr(told)) < 120


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("progress", "terminal", "shown"), [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False), (True, True, True),
])  # fmt: skip
def test_bars_are_shown_on_a_terminal_or_when_asked_for(monkeypatch, progress, terminal, shown):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    asked = []
    track = progress_bar.track
    monkeypatch.setattr(
        "surgery.planning.adapter_init.track",
        lambda *args, enabled, **options: asked.append(enabled) or track(*args, enabled=enabled, **options),
    )
    apply_surgery(small_model("mlp").model, "antipasto", r=2, progress=progress)
    assert asked == [shown]
    assert sys.stdout.getvalue() == ""
    if not shown:
        assert stream.getvalue() == ""


@pytest.mark.parametrize("progress", ["x", 3, 1])
def test_progress_is_a_flag_or_none(progress):
    with pytest.raises(InputError, match="progress must be True, False or None"):
        apply_surgery(small_model("mlp").model, "antipasto", progress=progress)
