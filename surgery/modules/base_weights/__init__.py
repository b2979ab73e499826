"""Kinds of base weights: how a frozen weight is read as a matrix, known by a fingerprint, and given a change.

A file in this package defines one :class:`BaseWeight` and is found without any list. A kind is asked whether it accepts
a parameter; the first one that does is taken, and a parameter that none accepts is refused by name.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import nn

from passes.analysis.linear_sites import Site
from surgery.errors import WeightError
from surgery.support.configuration import import_all
from surgery.support.distributed import is_sharded, whole
from surgery.support.fingerprint import DTYPES, can_be_cast, cast_fingerprints, fingerprint, is_base
from surgery.support.untrusted_files import JsonObject

BLOCK = 2**18  # entries of a weight that are summed in float64 at a time, at least of 64 rows
KINDS: dict[str, type[BaseWeight]] = {}
SUPPORTED = "supported are plain float16, bfloat16, float32 and float64 parameters"


class Reader(Protocol):
    """Where a base weight is read from: the host of an adapter, or a model before surgery."""

    def parameter(self) -> torch.Tensor:
        """The parameter that holds the weight; of a part of a packed weight, the whole."""


class Held:
    """Reader of a weight that is at hand, whoever owns it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False) if type(weight) is torch.Tensor else weight

    def parameter(self) -> torch.Tensor:
        """The weight as a parameter."""
        return self.weight


class BaseWeight:
    """The frozen weight of one site.

    Attributes:
        holds_entries: whether the entries of the parameter are those of the matrix. Where they are not (a quantised
            weight), the site has to be a module that is called, in delta form, and no lowering reads the weight.
        reader: where its parameter is read from.
        layout: "out_in", or "in_out" (stored transposed).
        matrix_shape: ``(d_out, d_in)``, or of a stack of matrices ``(stack, d_out, d_in)``.
        rows: first row, and the one after the last, of a part of a packed weight.
    """

    kind: ClassVar[str]
    holds_entries: ClassVar[bool] = True

    def __init__(
        self, reader: Reader, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None = None
    ) -> None:
        self.reader, self.layout, self.matrix_shape, self.rows = reader, layout, matrix_shape, rows

    def __init_subclass__(cls) -> None:
        KINDS[cls.kind] = cls

    @classmethod
    def accepts(
        cls, parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None
    ) -> bool:
        """Whether this kind is that of a parameter."""
        raise NotImplementedError

    def tensor(self) -> torch.Tensor:
        """The weight as it is stored, of a part its rows."""
        return self.reader.parameter()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight as it is stored."""
        return self.tensor().shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in."""
        return self.reader.parameter().dtype

    @property
    def dtype_name(self) -> str:
        """The dtype as files say it, "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.reader.parameter().device

    def matrix(self) -> torch.Tensor:
        """The weight as floating-point numbers, :attr:`matrix_shape`; a view where it can be."""
        return matrices_of(whole(self.tensor()), self.layout, self.matrix_shape)

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: numbers in the layout and shape of the stored weight."""
        found = matrix if self.layout == "out_in" else matrix.mT
        if found.dim() == len(self.shape) == 2:  # whose sizes a trace may leave free
            return found
        return found if found.shape == self.shape else found.reshape(self.shape)

    def why_not(self) -> str | None:
        """Why it cannot be factorised, or None."""
        parameter = self.reader.parameter()
        if parameter.numel() == 0:
            return f"its weight of shape {tuple(parameter.shape)} has no entries"
        if reason := self.why_not_there():
            return reason
        entries = parameter if self.holds_entries else self.matrix()
        if torch.isfinite(entries).all():
            return None
        return f"{int((~torch.isfinite(entries)).sum())} of {entries.numel()} entries of its weight are not finite"

    def why_not_there(self) -> str | None:
        """Why its entries cannot be read, or None."""
        return _ON_META if self.reader.parameter().is_meta else None

    def why_not_whole(self) -> str | None:
        """Why it cannot be read as a whole by this process alone, or None; it may have been sharded since surgery."""
        return _SHARDED if is_sharded(self.reader.parameter()) else None

    def fingerprint(self) -> str:
        """SHA-256 of what the weight is known by in files."""
        return fingerprint(whole(self.tensor()))

    def known_by(self) -> JsonObject:
        """What a file says of it: its dtype, its fingerprint, and those of what a cast to another dtype would give."""
        if not self.holds_entries:
            return {"dtype": self.dtype_name, "fingerprint": self.fingerprint(), "casts": {}}
        weight = whole(self.tensor())
        return {"dtype": self.dtype_name, "fingerprint": fingerprint(weight), "casts": cast_fingerprints(weight)}

    def comparable(self, entry: JsonObject) -> bool:
        """Whether it can be compared with the weight that a file describes."""
        if not self.holds_entries:
            return bool(self.dtype_name == entry["dtype"])
        return can_be_cast(self.tensor(), entry)

    def is_that_of(self, entry: JsonObject) -> bool:
        """Whether it is the weight that a file describes, or that weight in another dtype."""
        if not self.holds_entries:
            return bool(self.fingerprint() == entry["fingerprint"])
        return is_base(self.tensor(), entry)

    def with_delta(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | str:
        """``W + left right`` as a new tensor like the stored one, summed in float64 and rounded once, or why not.

        Few rows are summed at a time, so that no second weight of eight bytes per entry is held.

        Args:
            left, right: (d_out, r) in float64 and (r, d_in), or stacks of them.
        """
        original = self.tensor().to(left.device)  # in residual form it may wait elsewhere
        weight = torch.empty_like(original, memory_format=torch.contiguous_format)
        pairs = (_stack(matrices_of(w, self.layout, self.matrix_shape)) for w in (original, weight))
        for base, merged, U, Vh in zip(*pairs, _stack(left), _stack(right), strict=True):
            wide = Vh.to(torch.float64)
            rows = max(64, BLOCK // base.shape[1])
            for part in (slice(start, start + rows) for start in range(0, len(base), rows)):
                merged[part] = base[part].to(torch.float64) + U[part] @ wide
        return weight


_ON_META = f"its weight is on the meta device; load the weights first ({SUPPORTED})"
_SHARDED = "its weight is sharded; operate, load or merge before fully_shard"


def _stack(matrices: torch.Tensor) -> torch.Tensor:
    """A matrix as a stack of one."""
    return matrices if matrices.dim() == 3 else matrices[None]


def matrices_of(weight: torch.Tensor, layout: str, shape: tuple[int, ...]) -> torch.Tensor:
    """See a weight in its own layout as a matrix (d_out, d_in) or a stack of them (stack, d_out, d_in)."""
    if layout == "out_in":
        return weight if weight.shape == shape else weight.reshape(shape)
    stored = (*shape[:-2], shape[-1], shape[-2])
    return (weight if weight.shape == stored else weight.reshape(stored)).mT


def is_plain(parameter: torch.Tensor) -> bool:
    """Whether the entries of a parameter are there as plain floating-point numbers."""
    data = parameter.data if isinstance(parameter, nn.Parameter) else parameter
    plain = type(parameter) is nn.Parameter and type(data) is torch.Tensor and parameter.layout is torch.strided
    return plain and parameter.dtype in DTYPES.values()


def why_not_plain(parameter: torch.Tensor) -> str:
    """What a parameter is that no kind accepts."""
    if parameter.is_meta:
        return _ON_META
    if is_sharded(parameter):
        return _SHARDED
    data = parameter.data if type(parameter) is nn.Parameter else parameter
    if type(data) is not torch.Tensor:
        package = type(data).__module__.partition(".")[0]
        what = f"is a {type(data).__name__} ({package}) of {parameter.dtype}, a subclass of torch.Tensor"
    elif parameter.layout is not torch.strided:
        what = f"is stored as {parameter.layout}, without the entries that are zero"
    elif parameter.is_complex():
        what = f"is complex ({parameter.dtype})"
    else:
        whole_numbers = not parameter.is_floating_point() and parameter.dtype not in (torch.int8, torch.uint8)
        what = f"holds integers ({parameter.dtype})" if whole_numbers else f"is of {parameter.dtype}, quantised"
    return f"its weight {what}; {SUPPORTED}; leave it out with exclude_modules"


def base_weight_of(
    key: str, reader: Reader, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None = None
) -> BaseWeight:
    """The base weight of a site, of the kind that accepts its parameter.

    Raises:
        WeightError: no kind does: it is sharded, quantised, complex, or another tensor subclass.
    """
    parameter = reader.parameter()
    kind = kind_of(parameter, layout, matrix_shape, rows)
    if kind is not None:
        return kind(reader, layout, matrix_shape, rows)
    raise WeightError(f"site {key!r}: {why_not_plain(parameter)}")


class _InModel:
    """Reader of a site of a model that is not operated on there."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model, self.site = model, site

    def parameter(self) -> torch.Tensor:
        return self.site.parameter_of(self.model)


def base_weight_in(model: nn.Module, site: Site) -> BaseWeight:
    """The base weight of a site before surgery.

    Raises:
        WeightError: no kind accepts it.
    """
    shape = (site.d_out, site.d_in) if site.stack is None else (site.stack, site.d_out, site.d_in)
    return base_weight_of(site.key, _InModel(model, site), site.layout, shape, site.rows)


def kind_of(
    parameter: torch.Tensor, layout: str, matrix_shape: tuple[int, ...], rows: tuple[int, int] | None = None
) -> type[BaseWeight] | None:
    """The kind of a parameter as a site sees it, or None."""
    return next((k for k in KINDS.values() if k.accepts(parameter, layout, matrix_shape, rows)), None)


import_all(__name__, __path__)
