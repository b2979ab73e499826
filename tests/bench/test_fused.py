"""The benchmark of fused down-projections: what it runs, and its table."""

from __future__ import annotations

import json

import pytest
from torch import nn

from bench.micro import fused
from tests.support.three_projections import model

MODEL = "tests.support.three_projections:model"


def test_rows_and_their_table(tmp_path):
    text = fused.measure(tmp_path, MODEL, repeats=3, modes=["eager"], ranks=[4], tokens=[1, 8])
    rows = [json.loads(line) for line in (tmp_path / "fuse.jsonl").read_text().splitlines()]
    assert [(row["model"], row["mode"], row["r"], row["tokens"]) for row in rows] == [
        ("Attention", "eager", 4, 1),
        ("Attention", "eager", 4, 8),
    ]
    for row in rows:
        assert set(row["milliseconds"]) == {"base again", "folded", "fused", "fused over folded"}
        assert all(len(pairs) == 3 for pairs in row["milliseconds"].values())
        assert row["error"] < 1e-3
        assert {"command", "commit", "versions", "hardware", "seed", "threads"} <= set(row)
    assert (tmp_path / "fuse.md").read_text() == text == fused.markdown(rows)
    assert len(text.splitlines()) == 2 + len(rows)


def test_graphs_that_differ_are_not_timed(monkeypatch):
    real = fused.pipeline

    def wrong(model: nn.Module, *args: object, fuse: bool = False, **options: object) -> object:
        found = real(model, *args, fuse=fuse, **options)
        if fuse:
            found.graph.get_submodule("fused_0").get_buffer("rows").mul_(2)  # its own; the others are shared
        return found

    monkeypatch.setattr(fused, "pipeline", wrong)
    found, x = model()
    with pytest.raises(SystemExit, match="do not compute the same"):
        fused.contenders(found.eval().requires_grad_(False), ((x,), {}), 4)
