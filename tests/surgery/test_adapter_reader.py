"""Damaged, foreign and hostile adapter directories: each is refused by name, and the model stays what it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from surgery.storage.adapter_file import CONFIG, TENSORS
from tests.support.adapter_files import (
    Edit,
    bare_tensors,
    configuration,
    edit_config,
    edit_tensors,
    signed,
    with_configuration,
    write_older,
)
from tests.support.saved_adapters import refused, saved, site
from tests.support.zoo import small_model


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:7], None])
def test_truncated_empty_or_missing_files(file, damage, tmp_path):
    saved(tmp_path)
    if file == CONFIG:  # of the older formats
        write_older(tmp_path, configuration(tmp_path), bare_tensors(tmp_path))
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if damage:
        (tmp_path / file).write_bytes(damage(data))
    assert file in refused(tmp_path)


@pytest.mark.parametrize("offset", [-1, 8, 3, 2000])
def test_one_flipped_bit(offset, tmp_path):
    saved(tmp_path)
    data = bytearray((tmp_path / TENSORS).read_bytes())
    data[offset] ^= 1
    (tmp_path / TENSORS).write_bytes(data)
    refused(tmp_path)


TENSOR_DAMAGE: dict[str, tuple[Edit, str]] = {
    "NaN": (lambda t: t["2.factors.S"].__setitem__(1, float("nan")), "'2.factors.S' is not finite"),
    "infinity": (lambda t: t["0.core.g"].fill_(float("inf")), "'0.core.g' is not finite"),
    "wrong shape": (lambda t: t.update({"0.core.g": torch.zeros(13)}), r"'0.core.g' has shape (13,), expected (12,)"),
    "transposed": (lambda t: t.update({"4.factors.U": torch.ones(16, 6)}), "'4.factors.U' has shape"),
    "wrong dtype": (
        lambda t: t.update({"2.core.g": t["2.core.g"].half()}),
        "dtype torch.float16, expected torch.float32",
    ),
    "integers": (lambda t: t.update({"2.factors.S": torch.ones(16, dtype=torch.int32)}), "dtype torch.int32"),
    "dropped": (lambda t: t.pop("4.factors.Vh"), "'4.factors.Vh' is missing"),
    "extra": (lambda t: t.update({"4.core.h": torch.zeros(6)}), "unexpected tensor '4.core.h'"),
    "renamed": (lambda t: t.update({"5.core.g": t.pop("4.core.g")}), "'4.core.g' is missing"),
    "nothing": (lambda t: t.clear(), "is missing"),
}


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors(damage, sign, tmp_path):
    saved(tmp_path)
    edit, message = TENSOR_DAMAGE[damage]
    edit_tensors(tmp_path, edit, sign=sign)
    assert (message if sign else "is damaged: it is not the file") in refused(tmp_path)


CONFIG_DAMAGE: dict[str, tuple[Edit, str]] = {
    "unknown variant": (lambda c: c.update(variant="nonsense"), "unknown variant 'nonsense' (known: antipasto"),
    "variant of a site": (site("0", variant="nonsense"), "unknown variant"),
    "variant that is no text": (lambda c: c.update(variant=3), "'variant' must be a str"),
    "unknown hyper-parameter": (lambda c: c["hyperparameters"].update(nonsense=1), "no hyper-parameter nonsense"),
    "bad hyper-parameter": (lambda c: c["hyperparameters"].update(r="8"), "r must be an integer"),
    "factors_dtype": (lambda c: c["hyperparameters"].update(factors_dtype="float8"), "dtype"),
    "hyper-parameters of a site": (site("0", variant="antipasto", hyperparameters=3), "antipasto"),
    "rank": (site("0", r=7), "'0.core.g' has shape"),
    "rank too large": (site("4", r=7), "rank 7 does not fit"),
    "rank below 1": (site("4", r=0), "rank 0 does not fit"),
    "rank that is no integer": (site("4", r=6.0), "'r' must be a int"),
    "shape": (site("0", shape=[12, 24]), "shape [12, 24]"),
    "dtype": (site("0", dtype="float16"), "fingerprints differ"),
    "fingerprint": (site("2", fingerprint="sha256:0"), "fingerprints differ"),
    "weight": (site("2", weight="3.weight"), "site '2' has the weight '3.weight', which is of site '3'"),
    "weight of another site": (site("2", weight="0.weight"), "site '2'"),
    "bias": (site("0", bias="nonsense"), "no parameter 'nonsense'"),
    "bias that is no text": (site("0", bias=["0.bias"]), "bias"),
    "host": (site("0", host="nonsense"), "host 'nonsense'"),
    "layout": (site("0", layout="nonsense"), "layout 'nonsense'"),
    "site that is no table": (lambda c: c["sites"].update({"0": 3}), "site '0'"),
    "two sites of one weight": (lambda c: c["sites"].update({"x": c["sites"]["0"]}), "site 'x'"),
    "dropped site": (lambda c: c["sites"].pop("0"), "unexpected tensor"),
    "no sites": (lambda c: c.update(sites={}), "names no site"),
    "sites that are no table": (lambda c: c.update(sites=[]), "'sites' must be a dict"),
    "version 4": (lambda c: c.update(format_version=4), "format version 4, expected 1 to 3: upgrade"),
    "version 0": (lambda c: c.update(format_version=0), "format version 0, expected 1 to 3: save the adapter again"),
    "version of a configuration that stands beside the file": (
        lambda c: c.update(format_version=2),
        "'sha256' must be a str",
    ),
    "dtype that is none": (site("0", dtype="load"), "unknown dtype 'load'"),
    "casts": (site("0", casts=3), "'casts' must be a dict"),
    "seed": (site("0", seed="1"), "'seed' must be a int"),
    "seed of too many bits": (site("0", seed=2**64), "seed 18446744073709551616"),
    "version that is no number": (lambda c: c.update(format_version="1"), "format version '1'"),
    "other format": (lambda c: c.update(format="nonsense"), "no sspace-adapter configuration"),
    "factors": (lambda c: c.update(factors="nonsense"), "factors must be 'exact' or 'recompute', found 'nonsense'"),
    "factors that are stored": (lambda c: c.update(factors="recompute"), "'0.digest' is missing"),
    "digest": (lambda c: c.update(sha256=None), "'sha256' must be a str"),
    "digest that is none": (lambda c: c.update(sha256="\ud800"), "is damaged"),
    "base model": (lambda c: c.update(base_model_name_or_path=3), "'base_model_name_or_path' must be a str or null"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_damaged_configuration(damage, tmp_path):
    saved(tmp_path)
    edit, message = CONFIG_DAMAGE[damage]
    edit_config(tmp_path, edit)
    assert message in refused(tmp_path)


OF_FORMAT_3 = {
    "digest", "digest that is none", "base model", "version of a configuration that stands beside the file"
}  # fmt: skip
OLDER_DAMAGE: dict[str, tuple[Edit, str]] = {
    **{name: damage for name, damage in CONFIG_DAMAGE.items() if name not in OF_FORMAT_3},
    "version 1 with a later field": (lambda c: c.update(format_version=1, factors="recompute"), "'0.digest'"),
    "no digest": (lambda c: c.pop("sha256"), "'sha256' must be a str"),
}


@pytest.mark.parametrize("damage", OLDER_DAMAGE)
def test_damaged_configuration_of_format_2(damage, tmp_path):
    saved(tmp_path)
    edit, message = OLDER_DAMAGE[damage]
    config = configuration(tmp_path)
    edit(config)
    assert message in refused(write_older(tmp_path, config, bare_tensors(tmp_path)))


def test_a_header_that_has_lost_its_configuration(tmp_path):
    """The mirror beside it does not take its place."""
    saved(tmp_path)
    (tmp_path / TENSORS).write_bytes(bare_tensors(tmp_path))
    assert "its header has lost the adapter's configuration" in refused(tmp_path)


@pytest.mark.parametrize(("name", "key", "values"), [
    ("attention", "in_proj_weight", {"host": "module"}),
    ("raw", "w", {"host": "module"}),
    ("raw", "twice", {"layout": "in_out"}),
    ("gpt2", "transformer.h.0.attn.c_proj", {"layout": "out_in"}),
])  # fmt: skip
def test_a_host_or_layout_that_the_module_does_not_have(name, key, values, tmp_path):
    saved(tmp_path, name)
    edit_config(tmp_path, site(key, **values))
    assert f"site {key!r}" in refused(tmp_path, small_model(name).model)


def test_two_sites_of_one_weight(tmp_path):
    saved(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"x{n[1:]}": t[n].clone() for n in list(t) if n[0] == "0"}))
    edit_config(tmp_path, lambda config: config["sites"].update(x=config["sites"]["0"]))
    assert "site 'x'" in refused(tmp_path)


BYTES = {
    "bad JSON": b"{'variant': 1}",
    "deep JSON": b"[" * 100_000,
    "deep table": b'{"a":' * 100_000,
    "long number": b'{"format_version": ' + b"9" * 10_000 + b"}",
    "no UTF-8": b'{"format": "\xff\xfe\x80"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "byte order mark": "\ufeff{}".encode(),
    "zeros": bytes(100),
    "null": b"null",
    "list": b"[1, 2]",
    "other table": b'{"a": 1}',
}


@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES)
def test_configuration_that_is_none(data, tmp_path):
    saved(tmp_path)
    tensors = bare_tensors(tmp_path)
    (tmp_path / TENSORS).write_bytes(with_configuration(tensors, data))
    assert TENSORS in refused(tmp_path)
    assert CONFIG in refused(write_older(tmp_path, data, tensors))


@pytest.mark.parametrize(
    "data", [b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"{}", (9).to_bytes(8, "little") + b"{]"]
)
def test_tensors_that_are_none(data, tmp_path):
    saved(tmp_path)
    config = configuration(tmp_path)
    (tmp_path / TENSORS).write_bytes(signed(with_configuration(data, config)))
    refused(tmp_path)
    refused(write_older(tmp_path, config, data))


def test_paths_that_are_no_adapter(tmp_path):
    saved(tmp_path / "adapter")
    assert "is not a directory" in refused(tmp_path / "adapter" / CONFIG)
    assert "is not a directory" in refused(tmp_path / "nothing")
    assert TENSORS in refused(tmp_path)
    write_older(tmp_path / "adapter", configuration(tmp_path / "adapter"), bare_tensors(tmp_path / "adapter"))
    for file in (CONFIG, TENSORS):
        (tmp_path / "adapter" / file).unlink()
        (tmp_path / "adapter" / file).mkdir()
        assert file in refused(tmp_path / "adapter")


def test_a_peft_directory(tmp_path):
    get_peft_model(small_model("qwen3").model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "is a PEFT adapter; load it with peft" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "other"),
    [("mlp", "raw"), ("raw", "mlp"), ("qwen3", "llama"), ("llama", "qwen3"), ("encoder_layer", "attention")],
)
def test_another_architecture(name, other, tmp_path):
    saved(tmp_path, name)
    message = refused(tmp_path, small_model(other).model)
    assert any(words in message for words in ("another base model", "the model's is", "fingerprints differ"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.half])
def test_another_base_model_of_the_same_architecture(dtype, tmp_path):
    saved(tmp_path, "qwen3")
    assert "fingerprints differ" in refused(tmp_path, small_model("qwen3", dtype, seed=1).model)
