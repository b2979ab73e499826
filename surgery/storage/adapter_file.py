"""The file of an adapter: safetensors whose header holds the whole configuration, so that one rename replaces both.

Format 3. The header's metadata has one entry, ``sspace-adapter``: the configuration, as JSON. Its first field,
``sha256``, is the digest of the whole file, taken with zeros in the place of these 64 digits. ``adapter_config.json``
repeats the configuration for people and for other libraries; it is written after the file, and not read.

Formats 1 and 2. The configuration is ``adapter_config.json``, whose ``tensors_sha256`` is the digest of the file.

A header is read only up to ``surgery.support.untrusted_files.LIMIT`` (64 MiB), and both levels of its JSON are read as
strictly as any other (at most 2^22 values, 64 levels, no key twice, finite numbers).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from surgery.errors import AdapterError
from surgery.storage.adapter_config import FORMAT, checked
from surgery.storage.format_migration import SEPARATE
from surgery.support.hf_config import on_hub
from surgery.support.untrusted_files import LIMIT, JsonObject, open_regular, parse_json, read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
UNSIGNED = "0" * 64
CHUNK = 2**22


class StoredSlice(Protocol):
    """A tensor of a file before it is read."""

    def get_shape(self) -> list[int]: ...


class StoredTensors(Protocol):
    """The tensors of a safetensors file by name."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> StoredSlice: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


def encode(config: JsonObject, tensors: Mapping[str, torch.Tensor]) -> tuple[JsonObject, list[bytes | memoryview]]:
    """The content of an adapter's file; the same adapter gives the same bytes.

    Returns:
        The configuration, complete with its digest, and the bytes, in two parts: the header, and the tensors.
    """
    unsigned = {"sha256": UNSIGNED, **config}
    data = to_safetensors(dict(tensors), {FORMAT: json.dumps(unsigned, separators=(",", ":"))})
    digest = hashlib.sha256(data).hexdigest()
    size = 8 + int.from_bytes(data[:8], "little")
    header = data[:size].replace(UNSIGNED.encode(), digest.encode(), 1)
    return {**unsigned, "sha256": digest}, [header, memoryview(data)[size:]]


def is_adapter(folder: Path) -> bool:
    """Whether a folder looks like what ``save_adapter`` writes."""
    return (folder / TENSORS).exists() or (folder / CONFIG).exists()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a model's, and like no adapter's."""
    names = ("config.json", "model.safetensors", "model.safetensors.index.json")
    return not is_adapter(folder) and any((folder / name).exists() for name in names)


@dataclass(frozen=True)
class AdapterFile:
    """A checked file of an adapter, held open, so that no other one can be read in its place.

    Attributes:
        folder: the directory of the adapter.
        config: its configuration, in the present format.
    """

    folder: Path
    config: JsonObject
    _held: BinaryIO

    @contextlib.contextmanager
    def opened(self) -> Iterator[StoredTensors]:
        """Open it by safetensors: by the descriptor where that has a name, and else by the name of the file.

        Raises:
            AdapterError: it cannot be read, or was replaced where a descriptor has no name.
        """
        file = self.folder / TENSORS
        try:
            with contextlib.ExitStack() as stack:
                for name in (Path(f"/dev/fd/{self._held.fileno()}"), file):
                    if _is_at(self._held, name):
                        try:
                            tensors = stack.enter_context(safe_open(name, framework="pt"))
                        except RuntimeError:  # what torch says of a file that is gone
                            if _is_at(self._held, name):
                                raise
                            continue
                        if _is_at(self._held, name):  # still: what was opened is what was checked
                            yield tensors
                            return
                raise AdapterError(f"the adapter in {str(self.folder)!r} was replaced while it was read; begin again")
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error


@contextlib.contextmanager
def open_adapter(folder: Path) -> Iterator[AdapterFile]:
    """Open an adapter without a model, and check it by itself: one adapter also while another process replaces it.

    Raises:
        AdapterError: the directory is missing or damaged.
    """
    if not folder.is_dir():
        hub = f"; one on the Hub is fetched by pull_adapter({str(folder)!r})" if on_hub(folder) else ""
        raise AdapterError(f"{str(folder)!r} is not a directory; expected an adapter with {TENSORS}{hub}")
    file = folder / TENSORS
    if is_checkpoint(folder):
        raise AdapterError(f"{str(folder)!r} is a model's checkpoint; expected an adapter with {TENSORS}")
    while True:
        try:
            held = open_regular(file)
        except OSError as error:
            raise _unreadable(file, error) from error
        with held:
            try:
                config = _config_of(folder, held)
            except AdapterError:
                if _is_at(held, file) or not file.exists():
                    raise
                continue  # of the older formats, one of the two files was replaced between the two reads
            yield AdapterFile(folder, config, held)
            return


def _config_of(folder: Path, held: BinaryIO) -> JsonObject:
    """The checked configuration of the file that is held."""
    file = folder / TENSORS
    try:
        header = _header(held)
        text = _metadata(header).get(FORMAT)
        if text is None:
            return _separate_config(folder, held)
        found = parse_json(text)
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    config = checked(repr(str(file)), found)
    recorded = config["sha256"].encode(errors="replace")
    if _digest(held, header.replace(recorded, UNSIGNED.encode(), 1)) != config["sha256"]:
        raise AdapterError(f"{str(file)!r} is damaged: it is not the file that the digest in its header was made of")
    return config


def _separate_config(folder: Path, held: BinaryIO) -> JsonObject:
    """The configuration beside the file, as formats 1 and 2 have it."""
    file = folder / CONFIG
    where = repr(str(file))
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    config = checked(where, found)
    if found["format_version"] not in SEPARATE:
        raise AdapterError(f"{str(folder / TENSORS)!r} is damaged: its header has lost the adapter's configuration")
    if _digest(held, b"") != config["sha256"]:
        raise AdapterError(f"{str(folder / TENSORS)!r} is damaged or not the one that {CONFIG} was written with")
    return config


def _header(held: BinaryIO) -> bytes:
    """The header of a safetensors file, with the eight bytes before it that give its length.

    Raises:
        ValueError: it is longer than the file, or than ``LIMIT``.
    """
    held.seek(0)
    size = int.from_bytes(start := held.read(8), "little")
    if len(start) < 8:
        raise ValueError("it ends before its header begins")
    if size > LIMIT:
        raise ValueError(f"its header is larger than {LIMIT >> 20} MiB")
    header = held.read(size)
    if len(header) < size:
        raise ValueError("it ends within its header")
    return start + header


def _metadata(header: bytes) -> dict[str, str]:
    """The metadata in a header; safetensors itself checks the rest when it opens the file.

    Raises:
        ValueError: the header is no JSON object, or its metadata are no texts.
    """
    content = parse_json(header[8:])
    metadata = content.get("__metadata__", {}) if isinstance(content, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is no JSON object, or has metadata that are no texts")
    return metadata


def _digest(held: BinaryIO, header: bytes) -> str:
    """The digest of a file that begins with this header."""
    digest = hashlib.sha256(header)
    held.seek(len(header))
    while data := held.read(CHUNK):
        digest.update(data)
    return digest.hexdigest()


def _is_at(held: BinaryIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _unreadable(file: Path, error: Exception) -> AdapterError:
    return AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}")
