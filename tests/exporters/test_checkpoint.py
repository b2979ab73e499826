"""Checkpoints merged file by file: the tensors that the model's own merge gives, names, ties, kills, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from exporters import ExportError, export, merge_checkpoint
from surgery import (
    AdapterError,
    AntiPaSTO,
    InputError,
    VariantError,
    WeightError,
    apply_surgery,
    load_adapter,
    merge,
    save_adapter,
    set_coeff,
    sites,
)
from surgery.variants import REGISTRY
from tests.support.calibration_data import calibration_for
from tests.support.checkpoints import SMALL, assert_same_tensors, build, disturb, tensors_of
from tests.support.forked_commands import ForkedCommand


def prepare(
    tmp_path: Path, name: str, dtype: torch.dtype = torch.float32, variant: Any = "antipasto", **options: Any
) -> tuple[Path, Path, Any]:
    """A base folder, an adapter folder, and the model that carries the adapter."""
    shard = options.pop("max_shard_size", "50GB")
    build(name).to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
    model = type(build(name)).from_pretrained(tmp_path / "base")
    apply_surgery(model, variant, **{"r": 4, "progress": False, **options})
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model


ARCHITECTURES = ["qwen3", "gpt2", "vit", "t5", "gpt_neox", "olmoe"]
ARCHITECTURES += [pytest.param(name, marks=pytest.mark.full) for name in ("llama", "bert", "mixtral", "qwen3_moe")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tensors_are_those_of_the_models_own_merge(name: str, tmp_path: Path) -> None:
    base, adapter, model = prepare(tmp_path, name, max_shard_size="20KB")
    assert (base / "model.safetensors.index.json").exists()
    report = merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    assert 0 < report.max_error < 1e-7
    assert report.details["sites"] == len(sites(model))
    export(model, "dense", tmp_path / "dense")
    assert_same_tensors(tmp_path / "out", tmp_path / "dense")
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    loaded, merged = type(model).from_pretrained(tmp_path / "out").state_dict(), merge(model).state_dict()
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[key], merged[key]) for key in merged)


@pytest.mark.matrix
@pytest.mark.parametrize("variant", sorted(name for name, cls in REGISTRY.items() if cls().linear))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_linear_variant_and_dtype_at_any_coeff(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    calibration = calibration_for(variant, {"input_ids": torch.randint(0, 64, (4, 16))})
    base, adapter, model = prepare(tmp_path, "llama", dtype, variant, calibration=calibration)
    merge_checkpoint(base, adapter, tmp_path / "out", coeff=0.5, progress=False)
    set_coeff(model, 0.5)
    merged, found = merge(model).state_dict(), tensors_of(tmp_path / "out")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[key], merged[key]) for key in merged)


def test_files_keep_header_and_untouched_ones_are_links(tmp_path: Path) -> None:
    only = {"target_modules": r"model\.layers\.0\.mlp\.up_proj"}
    base, adapter, _ = prepare(tmp_path, "llama", max_shard_size="20KB", **only)
    report = merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    linked = [f for f in (tmp_path / "out").glob("*.safetensors") if f.samefile(base / f.name)]
    assert len(report.details["rewritten"]) == 1
    assert len(linked) == len(list(base.glob("*.safetensors"))) - 1
    name = report.details["rewritten"][0]
    with safe_open(tmp_path / "out" / name, "pt") as ours, safe_open(base / name, "pt") as theirs:
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        changed = [k for k in ours.keys() if not torch.equal(ours.get_tensor(k), theirs.get_tensor(k))]  # noqa: SIM118
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    assert {f.name for f in report.files} == {f.name for f in base.iterdir()}


def test_no_weights_of_other_formats_go_along(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama")
    for name in ("pytorch_model.bin", "optimizer.pt", "model.fp16.safetensors", "adapter_config.json", ".hidden"):
        (base / name).write_bytes(b"{}")
    for name in ("tokenizer.json", "merges.txt", "LICENSE"):
        (base / name).write_text("kept")
    merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merges.txt", "LICENSE"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_of_the_model_without_its_head(name: str, tmp_path: Path) -> None:
    base, adapter, model = prepare(tmp_path, name)
    whole = build(name)
    whole.base_model.save_pretrained(tmp_path / "headless")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))  # the head's class, the base's names
    prefix = f"{whole.base_model_prefix}."
    names = tensors_of(tmp_path / "headless").keys()
    assert not any(key.startswith(prefix) for key in names)
    merge_checkpoint(tmp_path / "headless", adapter, tmp_path / "out", progress=False)
    merged, found = merge(model), type(model).from_pretrained(tmp_path / "out")
    wanted = merged.base_model.state_dict()
    assert tensors_of(tmp_path / "out").keys() == names
    assert all(torch.equal(value, wanted[key]) for key, value in found.base_model.state_dict().items())


HEADS = {"qwen3": "lm_head", "gpt2": "lm_head", "bart": "lm_head", "bert_lm": "cls.predictions.decoder"}


@pytest.mark.matrix
@pytest.mark.parametrize("shard", ["50GB", "10KB"])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_tied_weights_are_refused_or_untied(name: str, shard: str, tmp_path: Path) -> None:
    options = {"target_modules": r".*(decoder|lm_head|up_proj|c_fc|fc1)", "max_shard_size": shard}
    base, adapter, model = prepare(tmp_path, name, **options)
    assert HEADS[name] in sites(model)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(WeightError, match=rf"'{HEADS[name]}' shares its weight with .*untie=True"):
        merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]
    merge_checkpoint(base, adapter, tmp_path / "out", untie=True, progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    export(model, "dense", tmp_path / "dense", untie=True, max_shard_size=shard)
    assert_same_tensors(tmp_path / "out", tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path / "out")
    merged = merge(model, untie=True).state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in loaded.state_dict().items())
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    if shard != "50GB":
        ours, theirs = (
            json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("out", "dense")
        )
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()


@pytest.mark.parametrize("name", ["t5", "switch"])
def test_models_that_cannot_be_untied(name: str, tmp_path: Path) -> None:
    """T5's configuration takes the flag for another one, and Switch's forward scales by it."""
    base, adapter, model = prepare(tmp_path, name, target_modules=["lm_head"])
    with pytest.raises(WeightError, match="cannot be untied"):
        merge_checkpoint(base, adapter, tmp_path / "out", untie=True, progress=False)
    with pytest.raises(ExportError, match=r"cannot be untied|differs by"):
        export(model, "dense", tmp_path / "out", untie=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_checkpoint_that_holds_both_ends_of_a_tie_with_other_values_is_not_tied(tmp_path: Path) -> None:
    build("qwen3").save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    stored["lm_head.weight"] = torch.randn_like(stored["model.embed_tokens.weight"])
    save_file(stored, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    apply_surgery(model, "antipasto", r=4, target_modules=["lm_head"], progress=False)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], merge(model).lm_head.weight)
    assert torch.equal(found["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


class Plain(nn.Module):
    """Linear, transposed and stacked weights of a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.raw = nn.Parameter(torch.randn(12, 8) / 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x))) @ self.raw


def plain(tmp_path: Path, model: nn.Module) -> tuple[Path, Path]:
    export(model, "dense", tmp_path / "base", example_inputs=torch.randn(3, 12))
    apply_surgery(model, "antipasto", r=4, example_inputs=torch.randn(3, 12), progress=False)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def test_a_plain_state_dict(tmp_path: Path) -> None:
    model = Plain()
    base, adapter = plain(tmp_path, model)
    merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    other = Plain()
    other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert len(sites(model)) == 3
    merged = merge(model).state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in other.state_dict().items())


def test_a_plain_state_dict_that_holds_a_weight_twice(tmp_path: Path) -> None:
    model = Plain()
    model.extra = nn.Linear(12, 20)
    base, adapter = plain(tmp_path, model)
    stored = load_file(base / "model.safetensors")
    stored["extra.weight"] = stored["one.weight"].clone()
    save_file(stored, base / "model.safetensors")
    with pytest.raises(WeightError, match=r"'one' shares its weight with extra\.weight"):
        merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    merge_checkpoint(base, adapter, tmp_path / "out", untie=True, progress=False)
    assert torch.equal(tensors_of(tmp_path / "out")["extra.weight"], stored["extra.weight"])


def refused(tmp_path: Path, error: type[Exception], match: str, base: Path, adapter: Path, **options: Any) -> None:
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        merge_checkpoint(base, adapter, tmp_path / "new" / "out", progress=False, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_another_base_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama", max_shard_size="20KB")
    shard = (
        base
        / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][
            "model.layers.1.mlp.down_proj.weight"
        ]
    )
    stored = load_file(shard)
    stored["model.layers.1.mlp.down_proj.weight"].view(-1)[7] += 1e-3
    save_file(stored, shard, {"format": "pt"})
    refused(tmp_path, AdapterError, r"'model\.layers\.1\.mlp\.down_proj'.*fingerprints differ", base, adapter)


def test_another_architecture_or_shape_is_refused(tmp_path: Path) -> None:
    _, adapter, _ = prepare(tmp_path, "llama")
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    refused(tmp_path, AdapterError, "another base model", tmp_path / "gpt2", adapter)
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 48}, intermediate_size=48, attention_bias=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    refused(tmp_path, AdapterError, "for a weight of shape", tmp_path / "wide", adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_checkpoint_in_another_dtype_is_merged(dtype: torch.dtype, tmp_path: Path) -> None:
    _, adapter, _ = prepare(tmp_path, "llama")
    model = build("llama").to(dtype)
    model.save_pretrained(tmp_path / "cast")
    merge_checkpoint(tmp_path / "cast", adapter, tmp_path / "out", progress=False)
    expected = merge(load_adapter(model, adapter)).state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama", max_shard_size="20KB")
    refused(tmp_path, ExportError, "is not a directory", tmp_path / "none", adapter)
    refused(tmp_path, AdapterError, "is not a directory", base, tmp_path / "none")
    refused(tmp_path, InputError, "finite", base, adapter, coeff=float("nan"))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    original = index["weight_map"][first]
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..", ".x.safetensors", "x.bin"):
        index["weight_map"][first] = name
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(tmp_path, ExportError, "is no file of that folder", base, adapter)
    index["weight_map"][first] = "gone.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, ExportError, r"cannot read .*gone\.safetensors", base, adapter)
    index["weight_map"][first] = next(n for k, n in index["weight_map"].items() if k != first and n != original)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, ExportError, "does not hold the tensor", base, adapter)
    (base / "model.safetensors.index.json").write_text("[]")
    refused(tmp_path, ExportError, "must hold a JSON object", base, adapter)
    (base / "model.safetensors.index.json").unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, ExportError, r"neither model\.safetensors nor .*\.bin", base, adapter)
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    refused(tmp_path, ExportError, "cannot read", base, adapter)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama")
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-10])
    refused(tmp_path, ExportError, "cannot read", base, adapter)


def test_an_adapter_that_is_damaged_or_not_linear(tmp_path: Path) -> None:
    base, adapter, model = prepare(tmp_path, "llama")
    data = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(data)
    refused(tmp_path, AdapterError, "damaged", base, adapter)
    from surgery import Contrast, undo_surgery

    undo_surgery(model)
    rows = [{"input_ids": torch.randint(0, 64, (4, 8))}]
    apply_surgery(
        model, "sspace", r=4, calibration=Contrast(rows, [{"input_ids": 63 - rows[0]["input_ids"]}]), progress=False
    )
    save_adapter(model, tmp_path / "gate")
    refused(tmp_path, VariantError, "sspace is not linear", base, tmp_path / "gate")


def test_a_sites_tensors_without_a_way_back_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import WeightConverter

    base, adapter, _ = prepare(tmp_path, "mixtral")

    def never(self: Any) -> Any:
        raise NotImplementedError("no way back")

    monkeypatch.setattr(WeightConverter, "reverse_transform", never)
    refused(tmp_path, ExportError, r'experts.*no way back.*export\(model, "dense"', base, adapter)


def test_a_full_target_and_a_path_under_a_file(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama")
    with pytest.raises(ExportError, match="new or empty directory"):
        merge_checkpoint(base, adapter, base, progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="nothing was left behind"):
        merge_checkpoint(base, adapter, tmp_path / "file" / "out", progress=False)
    (tmp_path / "out").mkdir()
    merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base", "file", "out"]


CHILD = """
import os, resource, sys, time
import torch
torch.set_num_threads(1)
from exporters import merge_checkpoint
from exporters.checkpoint import merge_folder as _checkpoint
base, adapter, out, mode = sys.argv[1:]
if mode == "slow":
    real = _checkpoint._merge_group
    def slow(*args):
        print("group", flush=True)
        time.sleep(0.05)
        return real(*args)
    _checkpoint._merge_group = slow
if mode.isdigit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(mode), int(mode)))
merge_checkpoint(base, adapter, out, progress=False)
"""


def child(*arguments: Any) -> ForkedCommand:
    return ForkedCommand([sys.executable, "-c", CHILD, *map(str, arguments)])


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama", max_shard_size="40KB")
    merge_checkpoint(base, adapter, tmp_path / "whole", progress=False)
    process = child(base, adapter, tmp_path / "out", "slow")
    for _ in range(5):  # four groups are finished
        assert process.stdout.readline() == "group\n", process.communicate()
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.merging").is_dir()
    again = child(base, adapter, tmp_path / "out", "slow")
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    total = len(json.loads((adapter / "adapter_config.json").read_text())["sites"])
    assert output.count("group") == total - 4
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base", "out", "whole"]


def test_what_a_kill_left_is_not_used_for_another_run(tmp_path: Path) -> None:
    base, adapter, model = prepare(tmp_path, "llama")
    left = tmp_path / ".out.merging" / "files"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"of another run")
    (left / "stray.json").write_text("{}")
    (left.parent / "journal").write_text('{"run": "another"}\n{"file model.safetensors": 0.0}')
    merge_checkpoint(base, adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "stray.json").exists()
    assert not left.parent.exists()
    assert torch.equal(
        tensors_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"],
        merge(model).model.layers[0].mlp.up_proj.weight,
    )


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    base, adapter, _ = prepare(tmp_path, "llama")
    size = (base / "model.safetensors").stat().st_size
    process = child(base, adapter, tmp_path / "new" / "out", str(size // 2))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "ExportError: cannot write" in errors
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base"]


MEASURED = """
import re, sys
import torch
torch.set_num_threads(1)
from exporters import merge_checkpoint
from exporters.checkpoint.plan import load_model
from tests.support.calibration_data import calibration_for
load_model(sys.argv[1])  # what merging imports counts before
def high():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = high()
merge_checkpoint(*sys.argv[1:], progress=False)
print(high() - before)
"""


def peak(base: Path, adapter: Path, out: Path) -> int:
    """Bytes that merging adds to the largest resident size of a fresh process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEASURED, str(base), str(adapter), str(out)]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


TARGETS = ["q_proj", "up_proj", "down_proj"]


def large(folder: Path, layers: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path, int]:
    """A checkpoint whose weights outgrow its adapter's, both made layer by layer; and the largest tensor's size."""
    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=layers, tie_word_embeddings=False, **wide)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base")
    apply_surgery(model, AntiPaSTO(r=16, svd_method="randomised"), target_modules=TARGETS, progress=False)
    disturb(model)
    save_adapter(model, folder / "adapter")
    return folder / "base", folder / "adapter", 1024 * 2048 * dtype.itemsize


@pytest.mark.long
@pytest.mark.parametrize("layers", [pytest.param(4, id="85MB"), pytest.param(20, id="420MB", marks=pytest.mark.full)])
def test_memory_is_that_of_one_tensor(layers: int, tmp_path: Path) -> None:
    base, adapter, largest = large(tmp_path, layers)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    extra = peak(base, adapter, tmp_path / "out")
    assert extra < 4 * largest + 64 * 2**20, (
        extra,
        size,
    )  # blocks in float64, and what the first use of a library takes
    if layers > 10:
        assert extra < size / 4


def test_a_merge_into_a_link_and_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = prepare(tmp_path, "llama")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    merge_checkpoint(base, adapter, tmp_path / "link", progress=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match=r"is the working directory.*name a new one in it"):
        merge_checkpoint(base, adapter, ".", progress=False)
    assert os.listdir(tmp_path / "here") == []
    merge_checkpoint(base, adapter, "new", progress=False)
    assert not [file for file in os.listdir(tmp_path) if file.startswith(".")]
