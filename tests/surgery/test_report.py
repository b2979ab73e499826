"""The report: every site and its cost, every other product and its reason."""

from __future__ import annotations

from surgery import apply_surgery, inspect_sites, load_adapter, report, save_adapter, sites
from surgery.hosting.hosts import host_of
from tests.support.operated_models import each_patient, operated
from tests.support.zoo import patient


@each_patient
def test_report_has_every_site_and_every_other_product(name):
    model = operated(name).model
    found = report(model)
    assert found.model == type(patient(name).model).__name__
    assert [site.key for site in found.sites] == list(sites(model))
    assert found.captured
    assert found.trainable == sum(site.trainable for site in found.sites)
    for row, site in zip(found.sites, sites(model).values(), strict=True):
        assert (row.d_out, row.d_in) == tuple(site.weight.shape if site.layout == "out_in" else site.weight.T.shape)
        assert (row.variant, row.r, row.host) == ("antipasto", len(site.factors.S), host_of(site))
        assert row.base_macs == site.weight.numel()
        assert row.method == "gram"
        assert 0 < row.energy <= 1
        assert row.macs == (row.r * (row.d_in + row.d_out) if row.host == "module" else 0)
    inspected = {site.key for site in inspect_sites(model).sites}
    assert inspected == {row.key for row in found.sites} | {s.where for s in found.skipped} & inspected
    assert all(skipped.reason for skipped in found.skipped)


def test_report_as_text(capsys):
    found = patient("qwen3")
    apply_surgery(found.model, "antipasto", r=4, target_modules=["q_proj", "lm_head"], progress=True)
    text = str(report(found.model))
    assert capsys.readouterr().out.split() == text.split()
    assert "model.layers.*.self_attn.q_proj" in text
    assert "lm_head" in text
    assert "inference, training: the lowering at 512 tokens" in text
    assert "12 x linear: not selected" in text
    assert "sites from transformers.exporters" in text
    text = str(report(apply_surgery(patient("vit").model, "antipasto", progress=False)))
    assert "1 x conv2d: conv2d with a parameter: its kernel of 8x8 mixes positions" in text


def test_report_of_a_loaded_adapter(tmp_path):
    expected = report(operated("raw").model)
    model = load_adapter(patient("raw").model, save_adapter(operated("raw").model, tmp_path))
    found = report(model)
    assert found.how == "adapter file"
    assert not found.captured
    assert [(s.key, s.r, s.host, s.macs) for s in found.sites] == [(s.key, s.r, s.host, s.macs) for s in expected.sites]
    assert {site.method for site in found.sites} == {None}
    assert "loaded" in str(found)
    assert "sites from adapter file (not captured)" in str(found)
