"""Statistics of all sites of a model: saved, reused, and merged across runs.

One safetensors file. Its metadata holds ``format``, ``version`` and ``content``, a JSON object::

    {"pool": null, "statistics": [{"kind": "moment", "side": "input", "d_in": 1024, "counts": {"all": 4096}}, ...],
     "sites": {"model.layers.0.mlp.up_proj": {"statistic": 0, "fingerprint": "sha256:..."}, ...}}

and tensor ``<i>.<sum>`` is a sum of statistic i, float64. Sites that read the same input share a statistic.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from passes.analysis.linear_sites import Site
from passes.errors import InputError
from surgery.errors import AdapterError
from surgery.factors.statistic import KINDS, Statistic
from surgery.support.untrusted_files import JsonObject, parse_json, path_of, require_regular

FORMAT, VERSION = "sspace-statistics", "1"
SUMS = {"moment": ("moment",), "squares": ("squares",), "absolute": ("absolute",), "contrast": ("positive", "negative")}


@dataclass(frozen=True)
class Statistics:
    """What one calibration collected; give it to ``apply_surgery(calibration=...)`` in place of data.

    Attributes:
        sites: the statistic of each site by key; sites that read the same input share one.
        fingerprints: of the base weight of each site.
        pool: how tokens of a contrast were pooled, or None.
    """

    sites: Mapping[str, Statistic]
    fingerprints: Mapping[str, str]
    pool: str | None = None

    @property
    def distinct(self) -> list[Statistic]:
        """Every statistic once."""
        return list({id(statistic): statistic for statistic in self.sites.values()}.values())

    @property
    def bytes(self) -> int:
        """Memory of all sums."""
        return sum(statistic.bytes for statistic in self.distinct)

    def of(self, site: Site, kind: str, weight: str, device: torch.device) -> Statistic:
        """The statistic of a site.

        Args:
            weight: the fingerprint of its base weight.
            device: to have it on.

        Raises:
            InputError: there is none, it is of another kind, or it was collected on another weight.
        """
        statistic = self.sites.get(site.key)
        if statistic is None:
            raise InputError(f"site {site.key!r}: the statistics do not cover it; they were collected at other sites")
        if statistic.kind != kind:
            raise InputError(f"site {site.key!r}: the statistics are of kind {statistic.kind!r}, needed is {kind!r}")
        if statistic.d_in != site.d_in or self.fingerprints[site.key] != weight:
            raise InputError(f"site {site.key!r}: the statistics were collected on another base weight")
        return statistic.to(device)

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both runs together.

        Raises:
            InputError: they are of other sites, weights or kinds.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.sites.keys() != other.sites.keys() or self.pool != other.pool:
            raise InputError("statistics of other sites, or pooled otherwise, cannot be merged")
        merged: dict[tuple[int, int], Statistic] = {}
        for key, mine in self.sites.items():
            theirs = other.sites[key]
            if self.fingerprints[key] != other.fingerprints[key]:
                raise InputError(f"site {key!r}: the two statistics were collected on different weights")
            if (mine.kind, mine.side) != (theirs.kind, theirs.side):
                raise InputError(f"site {key!r}: statistics of {mine.kind} and of {theirs.kind} cannot be merged")
            counts = {name: count + theirs.counts.get(name, 0) for name, count in mine.counts.items()}
            sums = {name: value + theirs.sums[name].to(value.device) for name, value in mine.sums.items()}
            pair = (id(mine), id(theirs))
            merged.setdefault(pair, Statistic(mine.kind, mine.side, mine.d_in, None, counts, sums))
        sites = {key: merged[id(mine), id(other.sites[key])] for key, mine in self.sites.items()}
        return Statistics(sites, self.fingerprints, self.pool)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the statistics to one file, atomically.

        Raises:
            InputError: it cannot be written; what was there is still there.
        """
        path, distinct = path_of(path, InputError), self.distinct
        number = {id(statistic): i for i, statistic in enumerate(distinct)}
        content = {
            "pool": self.pool,
            "statistics": [{"kind": s.kind, "side": s.side, "d_in": s.d_in, "counts": s.counts} for s in distinct],
            "sites": {
                key: {"statistic": number[id(statistic)], "fingerprint": self.fingerprints[key]}
                for key, statistic in self.sites.items()
            },
        }
        tensors = {f"{i}.{name}": t.cpu().contiguous() for i, s in enumerate(distinct) for name, t in s.sums.items()}
        data = to_safetensors(tensors, {"format": FORMAT, "version": VERSION, "content": json.dumps(content)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
                with open(Path(temporary) / "file", "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(file.name, path)
        except OSError as error:
            raise InputError(f"cannot write statistics to {str(path)!r}: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read statistics; they are on the CPU.

        Raises:
            AdapterError: the file is missing, damaged, or of another format.
        """
        path = path_of(path, AdapterError)
        where = f"statistics {str(path)!r}"
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                    raise AdapterError(
                        f"{where}: expected format {FORMAT} {VERSION}, found {metadata.get('format')!r:.40}"
                    )
                content = parse_json(metadata["content"])
                distinct = [_read(file, i, entry, where) for i, entry in enumerate(content["statistics"])]
            if content["pool"] not in (None, "last", "mean", "all"):
                raise AdapterError(f"{where}: unknown pool {content['pool']!r:.40}")
            entries = content["sites"]
            if any(not 0 <= entry["statistic"] < len(distinct) for entry in entries.values()):
                raise AdapterError(f"{where}: a site has a statistic that is not there")
            if not all(isinstance(entry["fingerprint"], str) for entry in entries.values()):
                raise AdapterError(f"{where}: a site has no fingerprint")
            sites = {key: distinct[entry["statistic"]] for key, entry in entries.items()}
            return cls(sites, {key: entry["fingerprint"] for key, entry in entries.items()}, content["pool"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error


def _read(file: safe_open, i: int, entry: JsonObject, where: str) -> Statistic:
    if type(entry["d_in"]) is not int:
        raise AdapterError(f"{where}: d_in of statistic {i} must be an integer, found {entry['d_in']!r:.40}")
    statistic = Statistic(entry["kind"], entry["side"], entry["d_in"], None, dict(entry["counts"]))
    if statistic.kind not in KINDS or statistic.side not in ("input", "output"):
        raise AdapterError(f"{where}: unknown kind {statistic.kind!r:.40} or side {statistic.side!r:.40}")
    sets = {"positive", "negative"} if statistic.kind == "contrast" else {"all"}
    if statistic.counts.keys() != sets or not all(type(n) is int and n > 0 for n in statistic.counts.values()):
        raise AdapterError(
            f"{where}: counts of {sorted(sets)} must be positive integers, found {statistic.counts!r:.80}"
        )
    extra = ("norm",) if (statistic.kind, statistic.side) == ("moment", "output") else ()
    for name in (*SUMS[statistic.kind], *extra):
        tensor = file.get_tensor(f"{i}.{name}")
        if tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
            raise AdapterError(f"{where}: sum {name!r} of statistic {i} is not a finite float64 tensor")
        if not _fits(statistic, name, tensor):
            raise AdapterError(f"{where}: sum {name!r} of statistic {i} has shape {tuple(tensor.shape)}")
        statistic.sums[name] = tensor
    return statistic


def _fits(statistic: Statistic, name: str, tensor: torch.Tensor) -> bool:
    """Whether a sum has the shape that its kind has; the size of an output is not known here."""
    if name == "norm":
        return tensor.dim() == 0
    if name == "moment":
        rows = statistic.d_in if statistic.side == "input" else len(tensor) if tensor.dim() else 0
        return tensor.shape == (rows, rows)
    return tensor.dim() == 1 and (name == "absolute" or len(tensor) == statistic.d_in)
