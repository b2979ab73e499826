"""Take adapter files apart and put them together, changed or damaged, with a digest that fits where that is wanted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from surgery.storage.adapter_config import FORMAT
from surgery.storage.adapter_file import CONFIG, TENSORS, UNSIGNED

Edit = Callable[[dict[str, Any]], Any]


def header_size(data: bytes) -> int:
    """Where the tensors of a safetensors file begin, by what it says itself."""
    return 8 + int.from_bytes(data[:8], "little")


def configuration(path: Path) -> dict[str, Any]:
    """The configuration in the header of an adapter."""
    data = (path / TENSORS).read_bytes()
    found: dict[str, Any] = json.loads(json.loads(data[8 : header_size(data)])["__metadata__"][FORMAT])
    return found


def bare_tensors(path: Path) -> bytes:
    """The tensors of an adapter as a file without metadata."""
    return save(load((path / TENSORS).read_bytes()))


def with_configuration(tensors: bytes, config: Any) -> bytes:
    """A file of these tensors with a configuration, any value or text, put into its header as it stands.

    Where the header is not where the file says, there is no place for it, and the file is given back.
    """
    size = header_size(tensors)
    if size > len(tensors) or tensors[8:9] != b"{":
        return tensors
    text = config if isinstance(config, bytes) else json.dumps(config, separators=(",", ":")).encode()
    quoted = b"".join(b"\\u%04x" % c if c < 32 else b"\\" * (c in b'"\\') + bytes([c]) for c in text)
    rest = tensors[9:size]
    header = b'{"__metadata__":{"%s":"%s"}' % (FORMAT.encode(), quoted) + b"," * (rest.strip() != b"}") + rest
    return len(header).to_bytes(8, "little") + header + tensors[size:]


def signed(data: bytes) -> bytes:
    """The file with a digest that fits its content, if it still has a field for one."""
    field = re.search(rb'sha256\\":\\"([0-9a-f]{64})', data)
    if field is None:
        return data
    blank = data[: field.start(1)] + UNSIGNED.encode() + data[field.end(1) :]
    digest = hashlib.sha256(blank).hexdigest().encode()
    return data[: field.start(1)] + digest + data[field.end(1) :]


def write_older(folder: Path, config: Any, tensors: bytes, *, sign: bool = True) -> Path:
    """An adapter of format 2 in a folder: a configuration of format 3 is turned back."""
    if isinstance(config, dict):
        digest = {"tensors_sha256": hashlib.sha256(tensors).hexdigest() if sign else config.get("sha256")}
        fields = config | (digest if "sha256" in config else {})
        config = {name: value for name, value in fields.items() if name not in ("sha256", "base_model_name_or_path")}
        if config.get("format_version") == 3:
            config["format_version"] = 2
    (folder / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (folder / TENSORS).write_bytes(tensors)
    return folder


def edit_config(path: Path, edit: Edit) -> None:
    """Change the configuration in the header of an adapter, and its digest with it."""
    config = configuration(path)
    edit(config)
    (path / TENSORS).write_bytes(signed(with_configuration(bare_tensors(path), config)))


def edit_tensors(path: Path, edit: Edit, *, sign: bool = True) -> None:
    """Change the tensors of an adapter, and its digest with them if signed."""
    config, tensors = configuration(path), load((path / TENSORS).read_bytes())
    edit(tensors)
    data = with_configuration(save(tensors), config)
    (path / TENSORS).write_bytes(signed(data) if sign else data)
