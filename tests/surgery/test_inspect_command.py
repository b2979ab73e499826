"""``surgery inspect``: the table, the JSON and the drawings of a model without weights."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from typer.testing import CliRunner

import surgery
from surgery.cli.inspect import choose, load_model
from surgery.cli.main import app
from tests.support.zoo import HUB, PYTORCH, small_model

runner = CliRunner()


def run(*arguments: str) -> str:
    result = runner.invoke(app, ["inspect", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = HUB["qwen3"]()[0].config
    config.architectures = ["Qwen3ForCausalLM"]
    path = tmp_path_factory.mktemp("qwen3")
    config.save_pretrained(path)
    return str(path)


def test_the_table_of_a_hub_model_without_weights(folder):
    text = run(folder, "--r", "8")
    assert "Qwen3ForCausalLM: 15 sites, from transformers.exporters" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith((" model", " lm_head"))}
    assert len(rows) == 8  # like sites of both layers share a row
    q = rows["model.layers.*.self_attn.q_proj"]
    for word in ("2", "32 x 32", "linear", "k_proj, v_proj", "r=8"):
        assert word in q
    assert "writes residual" in rows["model.layers.*.mlp.down_proj"]
    assert "writes residual" not in q
    assert "tied to model.embed_tokens.weight" in rows["lm_head"]


def test_every_site_has_a_row_on_request(folder):
    text = run(folder, "--all", "--target-modules", "q_proj,down_proj", "--exclude-modules", ".*layers.1.*")
    lines = [line for line in text.splitlines() if line.startswith((" model", " lm_head"))]
    assert len(lines) == 15
    chosen = [line.split()[0] for line in lines if "r=" in line]
    assert chosen == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert sum("not selected" in line for line in lines) == 12


def test_json_is_for_machines(folder):
    rows = json.loads(run(folder, "--json"))
    sites = {row["key"]: row for row in rows if "weight" in row}
    assert len(sites) == 15
    k = sites["model.layers.1.self_attn.k_proj"]
    assert (k["d_out"], k["d_in"], k["operation"], k["residual"], k["chosen"], k["r"]) == (
        16,
        32,
        "linear",
        False,
        True,
        16,
    )
    assert k["reads_with"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert sites["lm_head"]["tied"] == ["model.embed_tokens.weight"]
    assert all(row["reason"] for row in rows if not row["chosen"])


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_the_drawings_show_the_operated_site(folder, tmp_path, form):
    key = "model.layers.1.self_attn.o_proj"
    dot, svg = tmp_path / "site.dot", tmp_path / "site.svg"
    run(folder, "--r", "4", "--site", key, "--form", form, "--dot", str(dot), "--svg", str(svg))
    text = dot.read_text()
    assert text.startswith("digraph site {")
    for word in (
        "factors.U",
        "(32, 4)",
        "factors.S",
        "factors.Vh",
        "core.g",
        "steering.coeff",
        "aten.elu",
        "aten.linear",
    ):
        assert word in text
    assert ("W_res" in text) == (form == "residual")
    assert ("o_proj.weight" in text) == (form == "delta")
    names = {line.split('"')[1] for line in text.splitlines() if "[label" in line}
    edges = [line.split('"')[1::2] for line in text.splitlines() if "->" in line]
    assert {end for edge in edges for end in edge} == names  # nothing hangs in the air
    root = ElementTree.fromstring(svg.read_text())
    boxes = [e for e in root if e.tag.endswith("rect") and e.get("rx")]
    assert len(boxes) == len(names)
    corners = {(box.get("x"), box.get("y")) for box in boxes}
    assert len(corners) == len(boxes)  # no two boxes lie on one another
    assert all(
        float(b.get("x")) >= 0 and float(b.get("x")) + float(b.get("width")) <= float(root.get("width")) for b in boxes
    )


def test_a_callable_gives_a_model_and_its_inputs(tmp_path):
    text = run("tests.support.named_models:tiny", "--svg", str(tmp_path / "a.svg"))
    assert "Sequential: 2 sites, from torch.export" in text
    assert (tmp_path / "a.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tests.support.named_models:no_model", "gave a int, expected an nn.Module"),
        ("tests.support.named_models:nothing", "cannot call tests.support.named_models:nothing"),
        ("no.such.module:f", "cannot call no.such.module:f"),
        ("./no/such/folder", "cannot find a model"),
    ],
)
def test_what_is_no_model_is_said_so(source, expected):
    with pytest.raises(surgery.InputError, match=expected):
        load_model(source)


def test_wrong_choices_are_said_so(folder, tmp_path):
    model, _ = load_model(folder)
    with pytest.raises(surgery.TargetError, match="no site matches"):
        choose(model, target_modules=["nothing"])
    choice = choose(model, r=4)
    with pytest.raises(surgery.TargetError, match="no site is named 'nothing'"):
        choice.draw("nothing")
    with pytest.raises(surgery.InputError, match="form must be"):
        choice.draw("lm_head", form="other")
    with pytest.raises(surgery.InputError, match="cannot write"):
        surgery.cli.inspect.write_text(tmp_path / "no" / "folder", "")


@pytest.mark.parametrize("name", PYTORCH)
def test_a_choice_is_what_surgery_does(name):
    found = small_model(name)
    choice = choose(found.model, "antipasto", 4, found.inputs)
    surgery.apply_surgery(found.model, "antipasto", r=4, example_inputs=found.inputs, progress=False)
    ranks = {key: len(site.factors.S) for key, site in surgery.sites(found.model).items()}
    assert choice.ranks == ranks


def test_drawing_leaves_the_model_as_it_was():
    found = small_model("attention")
    base, flags = found.run(), [p.requires_grad for p in found.model.parameters()]
    choice = choose(found.model, "antipasto", 4, found.inputs)
    for key in choice.ranks:
        assert key.split(".")[-1][:3] in choice.draw(key, found.inputs).svg()
    assert torch.equal(found.run(), base)
    assert [p.requires_grad for p in found.model.parameters()] == flags
    assert surgery.sites(found.model) == {}
