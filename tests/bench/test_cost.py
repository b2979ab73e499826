"""The cost report: what each column means, rows that fail, files that agree, runs that are taken up again."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.common.load_model import device_of, inputs_for, load, varied
from bench.common.memory import Meter, held_by
from bench.common.runs import forward, products, shadow, step
from bench.common.timing import paired, quartiles
from bench.cost.table import markdown, number, record, size, speed
from bench.cost.worker import BASE, FULL, Measurement, disturb
from surgery import InputError, apply_surgery, report
from surgery.variants import REGISTRY
from tests.support.cost_runs import measured, run
from tests.support.zoo import HUB, small_model


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = HUB["qwen3"]()[0].config
    config.architectures = ["Qwen3ForCausalLM"]
    path = tmp_path_factory.mktemp("config")
    config.save_pretrained(path)
    return path


def test_a_row_has_what_it_says() -> None:
    row = measured("lora_xs", lowering="lowrank")
    assert "error" not in row
    assert (row["sites"], row["trainable"]) == (2, 2 * 4 * 4)
    assert row["macs"] == 2 * (4 * (16 + 32) + 4 * 4)
    assert row["base_macs"] == 2 * 16 * 32
    tokens = 12
    assert row["flops"]["forward"] == [2 * tokens * (row["base_macs"] + row["macs"]), 2 * tokens * row["base_macs"]]
    assert row["lowering"] == {"forward": {"lowrank": 2}, "step": {"lowrank": 2}}
    assert row["held_bytes"] == {"factors": 2 * 4 * 4 * (16 + 32 + 1), "core": 2 * 4 * 16, "kept": 0}
    assert row["file_bytes"] > row["held_bytes"]["factors"]
    assert set(row["milliseconds"]) == {"initialisation", "forward", "step", "merge"}
    assert [len(row["milliseconds"][kind]) for kind in ("forward", "step")] == [2, 2]
    assert all(value > 0 for kind in ("forward", "step") for pair in row["milliseconds"][kind] for value in pair)
    assert set(row["peak_bytes"]) == {"initialisation", "forward", "step"}


def test_the_base_and_full_fine_tuning() -> None:
    base, full = record(measured(BASE)), record(measured(FULL))
    assert (base["sites"], base["trainable"], base["held_mb"], base["initialisation_ms"]) == (0, 0, None, None)
    assert base["forward_flop_ratio"] == base["step_flop_ratio"] == full["forward_flop_ratio"] == 1
    assert full["step_flop_ratio"] == pytest.approx(1.5)  # a third product for the gradient of the weight
    assert full["trainable"] == 2 * 16 * 32 + 16 + 32
    assert full["file_mb"] == pytest.approx(4e-6 * full["trainable"])


def test_what_cannot_be_merged_or_trained_is_not_and_the_row_holds() -> None:
    row = measured("sspace")
    assert "error" not in row
    assert row["trainable"] == 0
    assert row["sites"] == 1  # what writes to the residual stream
    assert "merge" not in row["milliseconds"]
    assert size(record(row))["merge, ms"] == "n/a"


def test_a_variant_that_fails_is_a_row_that_says_why() -> None:
    row = measured("sspace", "tests.support.zoo:mlp")
    assert row["stage"] == "initialisation"
    assert "initialisation: TargetError" in row["error"]
    assert "residual-writers" in row["error"]
    row = measured("antipasto", "tests.support.zoo:mlp", lowering="dens")
    assert "InputError" in row["error"]
    text = markdown([measured(BASE, "tests.support.zoo:mlp"), row])
    assert "FAILED antipasto: initialisation: InputError" in text


def test_what_runs_out_of_memory_in_a_step_keeps_its_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Measurement) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(Measurement, "_step", fail)
    row = measured("antipasto")
    assert row["error"] == "forward and backward: out of memory (tried to allocate 80 GiB)"
    assert {"forward", "merge"} <= set(row["milliseconds"])
    assert speed(record(row))["fwd + bwd, ms"] == "n/a"


@pytest.mark.parametrize("name", ["antipasto", "antipasto_rot"])
def test_what_an_adapter_holds_is_what_lives_on(name: str) -> None:
    found = small_model("llama")
    model = found.model

    def live() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    found.run()
    before = live()
    apply_surgery(model, name, r=4, lowering="dense", progress=False)
    disturb(model, 0)
    found.run()
    held = held_by(model)
    sites = len(report(model).sites)
    assert held["kept"] >= sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight")) * 4
    # the handle of a site is 8 bytes, and what is compared with a value that has one
    assert live() - before == pytest.approx(sum(held.values()), abs=16 * sites)


def test_the_base_beside_a_model_is_its_own_and_takes_no_memory() -> None:
    found = small_model("qwen3")
    expected, base = found.run(), shadow(found.model)
    assert {p.data_ptr() for p in base.parameters()} == {p.data_ptr() for p in found.model.parameters()}
    assert base.lm_head.weight is base.model.embed_tokens.weight
    apply_surgery(found.model, "antipasto", r=4, progress=False)
    disturb(found.model, 0)
    assert not torch.equal(found.run(), expected)
    torch.testing.assert_close(found.run(base), expected)
    found.model.requires_grad_(True)
    assert not any(p.requires_grad for p in base.parameters())


def test_a_step_reaches_the_embeddings_and_changes_the_cores() -> None:
    found = small_model("qwen3")
    call = inputs_for(found.model, None, 2, 5)
    reached: list[torch.Tensor] = []
    base = shadow(found.model)
    run_base = step(base, call)
    base.model.embed_tokens.register_forward_hook(lambda m, a, y: y.register_hook(reached.append) and None)
    run_base()
    assert len(reached) == 1
    assert reached[0].abs().sum() > 0
    apply_surgery(found.model, "antipasto", r=4, progress=False)
    disturb(found.model, 0)
    cores = [p for p in found.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in cores]
    step(found.model, call)()()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cores)
    assert all(not torch.equal(p, old) for p, old in zip(cores, before, strict=True))


def test_products_are_counted_with_attention() -> None:
    found = small_model("llama")
    call = inputs_for(found.model, None, 1, 8)
    linear = sum(m.weight.numel() for m in found.model.modules() if isinstance(m, nn.Linear))
    attention = 2 * 2 * 8 * 8 * 32  # layers, two products, queries, keys, width
    rotary = 8 * 4  # positions by frequencies, a product too
    counted = products(forward(found.model, call), torch.device("cpu"))
    assert counted in (2 * (8 * linear + attention), 2 * (8 * linear + attention + rotary))


def test_pairs_are_neighbours_in_turning_order() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("base", "a")}
    times = paired(runs, 4)
    assert list(times) == ["a"]
    assert len(times["a"]) == 4
    assert order == ["base", "a", "a", "base"] * 3
    assert quartiles([[2.0, 1.0]]) == (2, 2, 2)
    assert quartiles([[1.0, 1.0], [2.0, 1.0], [6.0, 2.0], [4.0, 1.0], [5.0, 1.0]])[1] == 3


def test_a_peak_is_above_what_was_held() -> None:
    held = torch.ones(4_000_000)
    meter = Meter(torch.device("cpu"))
    with meter.peak("none"):
        pass
    with meter.peak("some"):
        del held
        torch.ones(20_000_000).sum()
    assert meter.peaks["some"] > 50e6
    if "so far" not in meter.how:
        assert meter.peaks["none"] < 20e6
        with meter.peak("later"):
            pass
        assert meter.peaks["later"] < 20e6


def test_inputs_of_a_wanted_size() -> None:
    model = small_model("qwen3").model
    args, kwargs = inputs_for(model, None, 3, 9, seed=1)
    assert args == ()
    assert kwargs["input_ids"].shape == (3, 9)
    assert kwargs["use_cache"] is False
    other = varied(((), {**kwargs, "attention_mask": torch.ones(3, 9, dtype=torch.long)}), 2)
    assert sorted(other["input_ids"].flatten().tolist()) == sorted(kwargs["input_ids"].flatten().tolist())
    assert not torch.equal(other["input_ids"], kwargs["input_ids"])
    assert inputs_for(small_model("vit").model, None, 3, 9)[1]["pixel_values"].shape == (3, 3, 32, 32)
    t5 = inputs_for(small_model("t5").model, None, 2, 5)[1]
    assert {t5["input_ids"].shape, t5["decoder_input_ids"].shape} == {torch.Size((2, 5))}
    x = inputs_for(small_model("mlp", torch.bfloat16).model, torch.randn(5, 12), 1, 1)[0][0]
    assert x.dtype == torch.bfloat16
    with pytest.raises(InputError, match="name a callable"):
        inputs_for(small_model("mlp").model, None, 1, 1)


def test_models_with_random_weights_and_with_their_own(config_folder: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model, inputs = load(str(config_folder), config_only=True, device=cpu, dtype="bfloat16")
    assert inputs is None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again, _ = load(str(config_folder), config_only=True, device=cpu, dtype="bfloat16")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(InputError, match="--config-only"):
        load(str(config_folder), device=cpu)
    model.save_pretrained(tmp_path)
    stored, _ = load(str(tmp_path), device=cpu)
    assert torch.equal(stored.lm_head.weight, model.lm_head.weight)
    assert stored.dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype must be one of"):
        load(str(tmp_path), device=cpu, dtype="int8")


@pytest.mark.parametrize("name", ["nowhere", "", "cuda:x", "meta", "hpu", "vulkan", "cuda:99"])
def test_a_device_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(InputError, match=f"^there is no device '{name}' here: .") as caught:
        device_of(name)
    assert "\n" not in str(caught.value)


def test_numbers_are_short() -> None:
    cases = {0.0: "0", 0.01234: "0.0123", 0.4: "0.4", 7.536: "7.54", 24.31: "24.3", 310.2: "310", 12345.6: "12,346"}
    assert {value: number(value) for value in cases} == cases
    assert number(None) == "n/a"


def test_a_configuration_alone_is_enough(config_folder: Path) -> None:
    rows = [measured(name, str(config_folder), config_only=True, batch=2, length=8) for name in (BASE, "sspace")]
    assert [row.get("error") for row in rows] == [None, None]
    heading = markdown(rows).splitlines()[0]
    assert "Qwen3ForCausalLM, 17,600 parameters, random weights, float32" in heading
    assert "2 x 8 tokens" in heading
    assert rows[1]["sites"] == 4
    assert "random" not in markdown([measured(BASE)]).splitlines()[0]


@pytest.mark.full
def test_every_variant_has_a_whole_row(config_folder: Path, tmp_path: Path) -> None:
    options = ["--config-only", "--r", 8, "--length", 16, "--repeats", 2, "--dtype", "bfloat16", "--device", "cpu"]
    text = run(config_folder, *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [BASE, FULL, *sorted(REGISTRY)]
    assert "FAILED" not in text
    for row in rows[2:]:
        found = record(row)
        lacking = {name for name, value in found.items() if value is None}
        assert lacking == {"error"} | ({"merge_ms"} if not REGISTRY[row["variant"]].linear else set())
        assert found["forward_flop_ratio"] >= 1
        assert found["peak_step_mb"] >= 0
    assert len(re.findall(r"^\| antipasto", (tmp_path / "cost.md").read_text(), re.MULTILINE)) >= 2
