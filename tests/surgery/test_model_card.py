"""The files beside an adapter: the mirror that leads other libraries here, and the model card."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn

from surgery import AntiPaSTO, load_adapter, save_adapter
from surgery.storage.adapter_file import CONFIG, TENSORS
from surgery.storage.model_card import CARD
from surgery.support.hf_config import base_model_name
from tests.support.adapter_files import configuration
from tests.support.operated_models import operate, operated
from tests.support.saved_adapters import saved
from tests.support.zoo import small_model

WORDS = r"load_adapter\(model, folder\) of the package sspace-surgery"


def of_base(folder: Path, name: str) -> Path:
    """An adapter of a language model that came from somewhere."""
    found = operated("qwen3")
    found.model.config._name_or_path = name
    return save_adapter(found.model, folder)


def test_errors_of_other_libraries_lead_to_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = small_model("qwen3").model
    base.save_pretrained("base")
    for name in ("base", ""):
        adapter = of_base(tmp_path / f"adapter of {name}", name)
        for load in (
            lambda adapter=adapter: peft.PeftModel.from_pretrained(base, adapter),
            lambda adapter=adapter: peft.PeftConfig.from_pretrained(adapter),
            lambda adapter=adapter: base.load_adapter(str(adapter)),
            lambda adapter=adapter: transformers.AutoModel.from_pretrained(adapter),
            lambda adapter=adapter: transformers.AutoModelForCausalLM.from_pretrained(adapter),
        ):
            with pytest.raises((KeyError, OSError, ValueError), match=WORDS):
                load()


def test_the_mirror_repeats_the_header(tmp_path):
    adapter = of_base(tmp_path / "a", "Qwen/Qwen3-0.6B")
    mirror, header = json.loads((adapter / CONFIG).read_text()), configuration(adapter)
    assert mirror == header | {name: mirror[name] for name in ("peft_type", "library_name")}
    assert mirror["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert mirror["library_name"] == "sspace-surgery"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/home/somebody/models/mine", "mine"),
        ("./models/mine/", "mine"),
        ("../models/mine", "mine"),
        ("C:\\models\\mine", "mine"),
        ("models/of/mine", "mine"),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123456789abcdef", "Qwen/Qwen3-0.6B"),
        ("there/model", "model"),
        (".", "here"),
        ("", None),
        (None, None),
        (3, None),
    ],
)
def test_a_base_model_is_named_and_never_a_path(given, name, tmp_path, monkeypatch):
    (tmp_path / "here" / "there" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    model = small_model("qwen3").model
    model.config._name_or_path = given
    assert base_model_name(model) == name
    assert base_model_name(nn.Linear(2, 2)) is None


def test_a_model_card(tmp_path):
    adapter = of_base(tmp_path / "a", "Qwen/Qwen3-0.6B")
    page = ModelCard.load(adapter / CARD)
    assert page.data.base_model == "Qwen/Qwen3-0.6B"
    assert page.data.base_model_relation == "adapter"
    assert page.data.library_name == "sspace-surgery"
    assert "antipasto: 14 sites, rank 16, 224 trainable numbers." in page.text
    code = page.text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    assert 'transformers.Qwen3ForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")' in code
    assert str(tmp_path) not in (adapter / CARD).read_text()


def test_the_card_of_a_model_of_no_library(tmp_path):
    found = small_model("raw")
    operate(found, target_modules=["w"], r=3)
    operate(found, target_modules=["out"], variant=AntiPaSTO(r=2, suppress_only=True), r=None)
    page = (save_adapter(found.model, tmp_path) / CARD).read_text()
    assert "base_model" not in page
    assert "antipasto: 2 sites, rank 2 to 3, 5 trainable numbers." in page
    assert f"model = ...  # the {type(found.model).__name__} that the adapter was made for" in page


def test_a_page_that_somebody_wrote_or_edited_is_kept(tmp_path):
    saved(tmp_path)
    first = (tmp_path / CARD).read_text()
    save_adapter(operate(small_model("mlp"), r=2).model, tmp_path)
    second = (tmp_path / CARD).read_text()
    assert first != second  # ours is replaced
    assert "rank 2" in second
    for page in (second.replace("rank 2", "rank two"), second + "More.\n", "mine", "", "<!-- sha256:0 -->\n"):
        (tmp_path / CARD).write_text(page)
        saved(tmp_path)
        assert (tmp_path / CARD).read_text() == page
    (tmp_path / CARD).unlink()
    saved(tmp_path)
    assert (tmp_path / CARD).read_text() == first


def test_something_else_in_the_place_of_a_card_is_kept(tmp_path):
    makes = (lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to("nowhere"), lambda p: p.write_bytes(b"\xff" * 100))
    for i, make in enumerate(makes):
        folder = tmp_path / str(i)
        folder.mkdir()
        make(folder / CARD)
        before = os.lstat(folder / CARD)
        saved(folder)
        assert os.path.samestat(os.lstat(folder / CARD), before)
        load_adapter(small_model("mlp").model, folder)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_what_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        for _ in range(2):  # a new folder, and one that is there
            saved(tmp_path / "parent" / "adapter")
            for path in (tmp_path / "parent", *(tmp_path / "parent").rglob("*")):
                wanted = (0o777 if path.is_dir() else 0o666) & ~mask
                assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    finally:
        os.umask(before)


def test_the_header_alone_is_an_adapter(tmp_path):
    found = saved(tmp_path)
    for name in (CONFIG, CARD):
        (tmp_path / name).unlink()
    fresh = small_model("mlp")
    load_adapter(fresh.model, tmp_path)
    assert torch.equal(fresh.run(), found.run())
    assert os.listdir(tmp_path) == [TENSORS]
