"""A checkpoint folder in the Hugging Face layout: which files there are, which tensor is in which, and what else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from exporters.checkpoint.tensor_io import CHUNK, Entry, SafetensorsFile, read_header
from surgery.errors import ExportError
from surgery.support.untrusted_files import JsonObject, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# weights of this and of other libraries, and pickles; none of them would be the merged model's
WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".gguf", ".npz",
)  # fmt: skip
ADAPTER = "adapter_config.json"  # from_pretrained would take it for a PEFT adapter to load


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder.

    Attributes:
        files: by name.
        where: the file of each tensor.
        index: the index file's content, or None of a single file.
        config: config.json's content, or None.
    """

    folder: Path
    files: dict[str, SafetensorsFile]
    where: dict[str, str]
    index: JsonObject | None
    config: JsonObject | None

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors."""
        return {key: self.files[name].entries[key] for key, name in self.where.items()}

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor."""
        return self.files[self.where[key]].read(key)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal, bit for bit."""
        a, b = self.entries[one], self.entries[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        first, second = self.files[self.where[one]], self.files[self.where[other]]
        with open(first.path, "rb") as left, open(second.path, "rb") as right:
            left.seek(8 + len(first.header) + a.start)
            right.seek(8 + len(second.header) + b.start)
            size = a.stop - a.start
            return all(left.read(n) == right.read(n) for n in _chunks(size))

    def with_copies(self, copies: dict[str, str]) -> Checkpoint:
        """The folder that has copies of tensors under new keys, each in the file of the tensor that it copies."""
        files, where = dict(self.files), dict(self.where)
        for key, source in copies.items():
            name = where[source]
            files[name] = files[name].extended({key: self.entries[source]})
            where[key] = name
        index = json.loads(json.dumps(self.index))
        if copies and index is not None:
            index["weight_map"] = {**index["weight_map"], **{key: where[key] for key in copies}}
            added = [self.entries[source] for source in copies.values()]
            totals = {"total_size": sum(entry.stop - entry.start for entry in added)}
            totals["total_parameters"] = sum(torch.Size(entry.shape).numel() for entry in added)
            metadata = index.setdefault("metadata", {})
            metadata.update({name: metadata[name] + n for name, n in totals.items() if name in metadata})
        return replace(self, files=files, where=where, index=index)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder.

    Raises:
        ExportError: it is no such folder, a file is missing or damaged, or a name leads out of the folder.
    """
    if not folder.is_dir():
        raise ExportError(f"{str(folder)!r} is not a directory; expected a checkpoint with {SINGLE} or {INDEX}")
    index = None
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        index = _json(folder / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ExportError(f"{str(folder / INDEX)!r} has no weight_map from tensors to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors") or name.startswith("."):
                raise ExportError(f"{str(folder / INDEX)!r} names the file {name!r}, which is no file of that folder")
    else:
        kinds = sorted({file.suffix for file in folder.iterdir() if file.suffix in WEIGHTS})
        found = f"; it has {', '.join(kinds)} files: save them as safetensors first" if kinds else ""
        raise ExportError(f"{str(folder)!r} has neither {SINGLE} nor {INDEX}{found}")
    files = {name: read_header(folder / name) for name in names}
    where: dict[str, str] = {}
    for name, file in files.items():
        if twice := sorted(where.keys() & file.entries.keys()):
            raise ExportError(f"tensor {twice[0]!r} is in two files, {where[twice[0]]!r} and {name!r}")
        where |= dict.fromkeys(file.entries, name)
    wanted = {} if index is None else index["weight_map"]
    if missing := [key for key, name in wanted.items() if where.get(key) != name]:
        raise ExportError(f"{wanted[missing[0]]!r} does not hold the tensor {missing[0]!r} that the index says it has")
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else None
    return Checkpoint(folder, files, where, index, config)


def other_files(folder: Path) -> list[Path]:
    """The files of a folder that go along with other weights: tokenizer, processor, licence; no weights, no pickles."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name != ADAPTER
        if not file.name.lower().endswith(WEIGHTS)
    )


def _json(path: Path) -> JsonObject:
    try:
        content = read_json(path, finite=False)  # some configurations say Infinity
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {str(path)!r}: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{str(path)!r} must hold a JSON object")
    return content


def _chunks(size: int) -> list[int]:
    return [min(CHUNK, size - start) for start in range(0, size, CHUNK)]
