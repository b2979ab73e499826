"""Files that were made to do harm: declared sizes, special files, links, pickles, deep and double JSON, odd names."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from exporters import ExportError, check_core, merge_checkpoint
from passes.errors import LONGEST, SurgeryError
from surgery import AdapterError, Statistics, load_adapter
from surgery.storage.adapter_file import CONFIG, TENSORS
from surgery.support.untrusted_files import DEPTH, LIMIT, VALUES, parse_json, path_of, read_json
from tests.support.fuzz import ESCAPE, MANY, bounded, outcome, printable, safetensors_file, written
from tests.support.fuzz_adapter import saved
from tests.support.model_state import state_of
from tests.support.zoo import small_model

MEMORY = 2**29
WORDS = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | NUMBERS | WORDS


def config_of(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(saved("mlp")[0])) | changes


def entry(name: str = "F32", shape: Any = (12,), offsets: Any = (0, 48)) -> dict[str, Any]:
    return {"dtype": name, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {
    "header of 2**60 bytes": (2**60).to_bytes(8, "little") + b"{}",
    "header of 2**64 - 1 bytes": b"\xff" * 8,
    "more than the file has": (1000).to_bytes(8, "little") + b"{}",
    "2**31 by 2**31": safetensors_file({"0.core.g": entry(shape=[2**31, 2**31])}, bytes(48)),
    "a product that overflows to what is there": safetensors_file({"0.core.g": entry(shape=[2**62, 4, 12])}, bytes(48)),
    "2**40, and offsets to match": safetensors_file({"0.core.g": entry(shape=[2**38], offsets=[0, 2**40])}, bytes(48)),
    "an empty tensor with a size that no tensor has": safetensors_file(
        {"0.core.g": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}
    ),
    "a size beyond 64 bits": safetensors_file({"0.core.g": entry(shape=[0, 2**64 - 1], offsets=[0, 0])}),
    "a negative size": safetensors_file({"0.core.g": entry(shape=[-12])}, bytes(48)),
    "a fraction": safetensors_file({"0.core.g": entry(shape=[12.0])}, bytes(48)),
    "offsets backwards": safetensors_file({"0.core.g": entry(offsets=[48, 0])}, bytes(48)),
    "a hole": safetensors_file({"0.core.g": entry(offsets=[8, 56])}, bytes(56)),
    "two tensors in one place": safetensors_file({"0.core.g": entry(), "2.core.g": entry()}, bytes(48)),
    "a name twice": safetensors_file(
        b'{"0.core.g":' + json.dumps(entry()).encode() + b',"0.core.g":' + json.dumps(entry("I32")).encode() + b"}",
        bytes(48),
    ),
    "100,000 dimensions": safetensors_file({"0.core.g": entry(shape=[1] * 100_000, offsets=[0, 4])}, bytes(4)),
    "deep": safetensors_file(b'{"0.core.g":' * 50_000),
    "a name of a megabyte": safetensors_file({"x" * 2**20: entry()}, bytes(48)),
    "a name with an escape sequence": safetensors_file({ESCAPE: entry()}, bytes(48)),
    "metadata of a wrong type": safetensors_file({"__metadata__": {"x": {}}, "0.core.g": entry()}, bytes(48)),
}
DTYPES = [
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I16", "U16", "F16", "BF16", "I32", "U32",
    "I64", "U64", "C64", "C128", "F128", "f32", "", "\x1b[31m",
]  # fmt: skip
WIDTHS = {"F4": 0.5, "F6_E2M3": 0.75, "16": 2, "32": 4, "64": 8, "C128": 16}


def refused(folder: Path) -> str:
    """Loading raises a typed error, soon and in little memory; the model is untouched."""
    model = small_model("mlp").model
    before = state_of(model)
    error = outcome(lambda: load_adapter(model, folder), memory=MEMORY)
    assert isinstance(error, AdapterError)
    assert state_of(model) == before
    return str(error)


def refused_in_each_format(folder: Path, config: Any, tensors: bytes, **options: Any) -> list[str]:
    """An adapter whose configuration is in the header is refused, and so is one with the configuration beside it."""
    messages = []
    for older in (False, True):
        (folder / str(older)).mkdir()
        messages.append(refused(written(folder / str(older), config, tensors, older=older, **options)))
    return messages


@pytest.mark.parametrize("name", HEADERS)
def test_tensors_with_a_hostile_header(name, tmp_path):
    refused_in_each_format(tmp_path, config_of(), HEADERS[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_another_dtype(dtype, tmp_path):
    good = load(saved("mlp")[1])
    bare = {name: tensor for name, tensor in good.items() if name != "0.core.g"}
    plain = save(bare)
    size = 8 + int.from_bytes(plain[:8], "little")
    header, data = json.loads(plain[8:size]), plain[size:]
    n = int(12 * next((w for end, w in WIDTHS.items() if dtype.endswith(end)), 1))
    header["0.core.g"] = entry(dtype, offsets=[len(data), len(data) + n])
    refused_in_each_format(tmp_path, config_of(), safetensors_file(header, data + bytes(n)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_factors_and_cores_that_are_not_finite(value, tmp_path):
    for name in ("0.core.g", "2.factors.U", "4.factors.S"):
        tensors = load(saved("mlp")[1])
        tensors[name].view(-1)[-1] = value
        assert name in refused(written(tmp_path, config_of(), save(tensors)))


SITES: dict[str, dict[str, Any]] = {
    "rank": {"r": 10**9},
    "rank of any length": {"r": 10**400},
    "shape": {"shape": [2**31, 2**31]},
    "shape and rank": {"shape": [10**9, 10**9], "r": 10**9},
    "a stack": {"host": "weight", "shape": [10**9, 24, 12]},
    "a stack of the right number of entries": {"host": "weight", "shape": [24 * 12, 1, 1], "r": 1},
    "rows": {"host": "weight", "rows": [0, 2**62]},
    "variant with a core of 10**12": {"variant": "antipasto_dplr", "hyperparameters": {"k": 10**12}},
    "variant with a core of 2**16": {"variant": "antipasto_dplr", "hyperparameters": {"k": 2**16}},
    "directions": {"variant": "antipasto_ablate", "hyperparameters": {"k": 10**12}},
    "block": {"variant": "antipasto_arrow", "hyperparameters": {"block": 10**12}},
    "rotation": {"variant": "antipasto_rot", "hyperparameters": {"block_size": 10**12}},
    "a parent folder": {"weight": "../../../etc/passwd"},
    "an attribute": {"weight": "0.__class__"},
    "another attribute": {"weight": "0.forward.weight"},
    "an escape sequence": {"weight": ESCAPE, "layout": ESCAPE},
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_that_asks_for_too_much(name, tmp_path):
    config = config_of()
    config["sites"]["0"] |= SITES[name]
    refused_in_each_format(tmp_path, config, saved("mlp")[1])


@pytest.mark.parametrize(
    "key", ["../../x", "/etc/passwd", ESCAPE, "", ".", "..", "0.weight", "__class__", "\ud800", "a\nb", "x" * 10**6]
)
def test_a_site_of_an_odd_name(key, tmp_path):
    config = config_of()
    config["sites"] = {key: config["sites"]["0"]}
    tensors = {n: t for n, t in load(saved("mlp")[1]).items() if n.startswith("0.")}
    if "\ud800" not in key:
        tensors = {f"{key}{name[1:]}": tensor for name, tensor in tensors.items()}
    before = sorted(tmp_path.parent.rglob("*"))
    refused_in_each_format(tmp_path, config, save(tensors))
    made = {path.name for path in set(tmp_path.parent.rglob("*")) - set(before)}
    assert made == {"False", "True", CONFIG, TENSORS}


TEXTS: dict[str, bytes] = {
    "a key twice": b'{"format": "sspace-adapter", "format": "sspace-adapter"}',
    "a key of a site twice": json.dumps(saved("mlp")[0]).replace('"layout":', '"layout": "", "layout":').encode(),
    "a key twice by an escape": b'{"format": 1, "f\\u006frmat": 2}',
    "NaN": json.dumps(saved("mlp")[0]).replace('"format_version": 3', '"format_version": NaN').encode(),
    "infinity by a large number": b'{"format": 1e999}',
    "deep": b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1),
    "deeper than Python": b"[" * 10**6,
    "a surrogate": b'{"format": "\\ud800"}',
    "not UTF-8": b'{"format": "\xff"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "empty": b"",
    "zeros": bytes(1000),
    "a number of a million digits": b"9" * 10**6,
    "two values": b"{}{}",
    "many values": b"[" + b"0," * (VALUES + 1) + b"0]",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_configuration(name, tmp_path):
    in_header, beside = refused_in_each_format(tmp_path, TEXTS[name], saved("mlp")[1])
    assert TENSORS in in_header
    assert CONFIG in beside


def test_a_configuration_of_a_gigabyte_is_not_read(tmp_path):
    written(tmp_path, config_of(), saved("mlp")[1], older=True)
    os.truncate(tmp_path / CONFIG, 2**30)
    assert "larger than 64 MiB" in refused(tmp_path)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path):
    """As long as the file, so that its length alone is no reason to refuse it."""
    for size, words in ((2**30, "its header is larger than 64 MiB"), (LIMIT, "cannot read")):
        (tmp_path / TENSORS).write_bytes(size.to_bytes(8, "little") + b"{")
        os.truncate(tmp_path / TENSORS, 8 + size)
        assert words in refused(tmp_path)


def test_the_mirror_is_not_read(tmp_path):
    """Whatever stands beside a file with a header: what is not read can do no harm."""
    for make in (lambda p: p.write_bytes(TEXTS["deep"]), lambda p: os.mkfifo(p), lambda p: p.mkdir(), lambda p: None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder / CONFIG)
        written(folder, *saved("mlp"))
        model = small_model("mlp").model
        assert outcome(lambda model=model, folder=folder: load_adapter(model, folder)) is None


# what reads a file, and would open whatever stands in its place
READERS: dict[str, Callable[[Path], Any]] = {
    "configuration": lambda p: load_adapter(small_model("mlp").model, folder_with(p, CONFIG, older=True)),
    "tensors": lambda p: load_adapter(small_model("mlp").model, folder_with(p, TENSORS)),
    "statistics": Statistics.load,
    "core": lambda p: check_core(swappable(p.parent), p),
    "graph": lambda p: check_core(p, p),
    "checkpoint": lambda p: merge_checkpoint(
        checkpoint_with(p), good_adapter(p.parent), p.parent / "out", progress=False
    ),
}


def good_adapter(parent: Path, *, older: bool = False) -> Path:
    folder = parent / "good"
    folder.mkdir(exist_ok=True)
    return written(folder, *saved("mlp"), older=older)


def folder_with(path: Path, name: str, *, older: bool = False) -> Path:
    folder = good_adapter(path.parent, older=older)
    if path.is_file() and older:  # signed, so that it is opened
        written(folder, saved("mlp")[0], path.read_bytes(), older=True)
    (folder / name).unlink()
    os.symlink(path, folder / name)
    return folder


def checkpoint_with(path: Path) -> Path:
    folder = path.parent / "base"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"0.weight": "a.safetensors"}}')
    os.symlink(path, folder / "a.safetensors")
    return folder


def swappable(folder: Path) -> Path:
    import onnx

    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), folder / "graph.onnx")
    return folder / "graph.onnx"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(os.path.relpath(path))


SPECIAL: dict[str, Callable[[Path], None]] = {
    "FIFO": fifo,
    "socket": listening,
    "endless device": lambda p: os.symlink("/dev/zero", p),
    "empty device": lambda p: os.symlink("/dev/null", p),
    "directory": lambda p: p.mkdir(),
    "loop": lambda p: os.symlink(p, p),
    "nothing": lambda p: None,
    "another file": lambda p: os.symlink("/etc/passwd", p),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_a_special_file_in_the_place_of_a_file(reader, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = tmp_path / "x"
    SPECIAL[kind](path)
    error = outcome(lambda: READERS[reader](path), memory=MEMORY)
    assert isinstance(error, AdapterError | ExportError)
    assert "root:" not in str(error)  # nothing of a foreign file is shown
    assert not (tmp_path / "out").exists()


class Marker:
    """What a pickle would run if anything unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_in_disguise_is_never_run(reader, legacy, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x"
    torch.save({"0.core.g": Marker(marker)}, path, _use_new_zipfile_serialization=not legacy)
    assert isinstance(outcome(lambda: READERS[reader](path)), AdapterError | ExportError)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # and it would have been made
    assert marker.exists()


@MANY
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner)))
def test_strict_json_reads_what_json_writes(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@MANY
@given(st.text(alphabet='[]{}",:0123456789.eE+-truefalsnNIity\\u \n\x1b\ud800') | st.text())
def test_strict_json_takes_no_more_than_json_and_raises_nothing_else(text):
    try:
        found = parse_json(text)
    except ValueError:
        return
    assert json.loads(text) == found


def test_small_and_regular(tmp_path):
    (tmp_path / "x").write_text('{"a": Infinity}')
    with pytest.raises(ValueError, match="Infinity is no JSON number"):
        read_json(tmp_path / "x")
    assert read_json(tmp_path / "x", finite=False) == {"a": float("inf")}
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "x", 3)
    os.mkfifo(tmp_path / "fifo")
    with bounded(), pytest.raises(OSError, match="no regular file"):
        read_json(tmp_path / "fifo")
    for path in (None, 3, b"x", "", "\0", "\ud800", "x" * 5000, ["x"]):
        with pytest.raises(AdapterError, match="is no path"):
            path_of(path, AdapterError)


@MANY
@given(st.text())
def test_every_message_is_fit_for_a_terminal(text):
    error = SurgeryError(f"site {text!r}, or {text}, or {text * 1000}")
    assert printable(error)
    assert len(str(error)) <= 1.1 * LONGEST


def test_a_message_says_what_was_odd():
    assert str(AdapterError(f"site {ESCAPE}")).startswith(r"site \x1b]0;title\x07\x1b[31m\u202eevil\r")
    assert str(AdapterError("é 日本 → ok")) == "é 日本 → ok"


def test_the_digest_is_of_the_whole_file(tmp_path):
    written(tmp_path, *saved("mlp"))
    good = (tmp_path / TENSORS).read_bytes()
    for place in (9, 40, 100, 200, good.index(b'"r') + 3, len(good) // 2, len(good) - 1):
        (tmp_path / TENSORS).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        refused(tmp_path)
    (tmp_path / TENSORS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "is damaged" in refused(tmp_path)
    (tmp_path / TENSORS).write_bytes(good.replace(b"out_in", b"out_ir", 1))
    assert "is damaged" in refused(tmp_path)


def test_the_digest_of_the_older_format_is_of_the_tensors(tmp_path):
    config, tensors = saved("mlp")
    written(tmp_path, config, tensors, older=True)
    assert json.loads((tmp_path / CONFIG).read_text())["tensors_sha256"] == hashlib.sha256(tensors).hexdigest()
    (tmp_path / TENSORS).write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    assert "is damaged or not the one" in refused(tmp_path)
