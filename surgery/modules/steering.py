"""The coefficient of a model: one small module that the adapters of a root share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import nn

from passes.ir.torch_internals import backward_task, same_version, unseen_by_checkpoints
from surgery.modules.recorded_coefficient import OWN, RecordedCoefficient
from surgery.modules.setting import CoreVersions, Setting

HALF = (torch.float16, torch.bfloat16)
NAMES = ("coeff", "second")


class Steering(RecordedCoefficient):
    """Holds ``coeff`` for all adapters of a root, so that a change is one write.

    It is registered once, in the first adapter; the others hold it in a tuple. So it is never a child of a user's
    module: ``nn.Sequential`` would call it.

    Attributes:
        coeff: a buffer, 0-d (all), (rows,), or (rows, positions); float32 or float64, whatever the model is cast to.
        second: the coefficient along the other sequence of a model that has two, or None.
        armed: True while the root is being called, which has checked what is derived from the cores. Only then do
            lowerings use what is cached, and only then are rows known to be those of the call.
        caller: the thread whose rows or tokens ``coeff`` holds for the length of its call of the root; others wait.
        generating: True inside of the root's ``generate``.
        rows: how rows relate to a batch, "exact", "repeat" or "tile".
        probe: while it is measured which entries belong to which row, sees what each site is given and says what its
            core adds; else None.
        requires_grad: flags of the root's parameters before surgery, for copies of its parts.
        root: a weak reference to the model; a copy of a part has none, and is a root of its own from its first verb on.
        look: takes a snapshot of the root's cores.
        given: what was set, where it is more than a number.
        log: what was in force when, for forwards that are recomputed; None until one was recorded.
        handle: the number by which compiled code finds it; a tensor, so that no graph holds its value.
    """

    coeff: torch.Tensor
    second: torch.Tensor | None

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        super().__init__()
        with torch.inference_mode(False):  # a tensor of inference mode could never be set
            self.register_buffer("coeff", torch.ones((), dtype=dtype, device=device), persistent=False)
        self._buffers["second"] = None
        self.armed, self.generating, self.rows = False, False, "exact"
        self.caller: int | None = None
        self.probe: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
        self.root: Callable[[], nn.Module | None] | None = None
        self.look: Callable[[], CoreVersions] | None = None
        self.requires_grad: dict[str, bool] = {}
        self.copies: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._written: tuple[tuple[str, torch.Tensor, int, torch.Tensor], ...] = ()
        self._number: tuple[torch.Tensor, int, float] | None = None
        self._begin_log()

    def value(self, stream: int, device: torch.device) -> torch.Tensor:
        """The coefficient for a site on a device, which follows the main (0) or the second sequence (1) of a model."""
        coeff: torch.Tensor = self._buffers["coeff"]  # type: ignore[assignment]
        if stream and self.second is not None:
            coeff = self.second
        if coeff.device == device:
            return coeff
        copy = self.copies.get((stream, device))
        return coeff.to(device) if copy is None else copy

    def write(
        self, coeff: torch.Tensor, second: torch.Tensor | None = None, *, rows: str = "exact", given: object = None
    ) -> None:
        """Set the coefficient: in place where the sizes allow, which no compiled code notices.

        Where a graph of autograd may have been recorded since the last change, and so may hold the tensor, it is a new
        one. Within a backward it holds for the rest of the recomputation that sets it.
        """
        values, like = (coeff, second), self.coeff
        with torch.inference_mode(False), torch.no_grad(), unseen_by_checkpoints():
            if backward_task() != -1:
                made = [None if v is None else v.to(like.device, like.dtype, copy=True) for v in values]
                assert made[0] is not None
                self.set_setting(Setting(made[0], made[1], {}, rows, given=given))
                return
            if self._is(coeff, second, rows):
                return
            anew = self.begin_change()
            for name, value in zip(NAMES, values, strict=True):
                old: torch.Tensor | None = self._buffers[name]
                if old is not None and value is not None and old.shape == value.shape and not anew:
                    old.copy_(value)
                else:
                    self._buffers[name] = None if value is None else value.to(like.device, like.dtype, copy=True)
            names = self._non_persistent_buffers_set  # accelerate moves every buffer that is named there, but not None
            names.discard("second") if self._buffers["second"] is None else names.add("second")
            self.refresh_copies(anew=anew)
        self.rows, self.given, mine = rows, given, self.coeff
        self._number = (mine, mine._version, float(coeff)) if coeff.dim() == 0 and not mine.is_inference() else None
        self.remember()
        self.end_change()

    def remember(self) -> None:
        """Take what the buffers hold for what was written."""
        held = ((name, self._buffers[name]) for name in NAMES)
        self._written = tuple(
            (n, t, t._version, t.detach().clone()) for n, t in held if t is not None and not t.is_inference()
        )

    def _is(self, coeff: torch.Tensor, second: torch.Tensor | None, rows: str) -> bool:
        """Whether a number is what is set already."""
        if self._number is None or coeff.dim() or second is not None or self._buffers["second"] is not None:
            return False
        tensor, version, number = self._number
        same = tensor is self.coeff and tensor._version == version and number == float(coeff)
        return same and rows == self.rows and self.given is None

    def write_back(self) -> None:
        """Write the coefficient again where something else may have written to it, as DDP does with the first rank's.

        DDP bumps no version, so that among several processes it is written before each call of the root.
        """
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        for name, tensor, version, value in self._written:
            if tensor is self._buffers[name] and (together or tensor._version != version):
                with torch.inference_mode(False), torch.no_grad(), same_version(tensor):
                    tensor.copy_(value)
                self._written = tuple((n, t, t._version if t is tensor else v, c) for n, t, v, c in self._written)
                self.refresh_copies()

    def refresh_copies(self, *, anew: bool = False) -> None:
        """Bring the copies on other devices up to date.

        Args:
            anew: by new tensors.
        """
        for stream, device in self.copies:
            self._copy(stream, device, anew=anew)

    def spread(self, devices: Iterable[torch.device]) -> None:
        """Hold a copy on each other device that has sites."""
        self.copies.clear()
        for device in dict.fromkeys(devices):
            if device != self.coeff.device:
                for stream in (0, 1):
                    self._copy(stream, device)

    def _copy(self, stream: int, device: torch.device, *, anew: bool = False) -> None:
        value = self._buffers[NAMES[stream]]
        old = self.copies.get((stream, device))
        if value is None:
            value = self.coeff
        if old is not None and old.shape == value.shape and not anew:
            old.copy_(value)
        else:
            self.copies[stream, device] = value.to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(keeping_precision(fn), recurse)  # type: ignore[no-untyped-call]
        self.copies.clear()
        self.remember()
        return self

    def __getstate__(self) -> dict[str, object]:
        state = vars(self) | {
            "armed": False,
            "caller": None,
            "generating": False,
            "root": None,
            "look": None,
            "_written": (),
            "_number": None,
            "probe": None,
        }
        return {name: value for name, value in state.items() if name not in OWN}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        given = self.given
        self._begin_log()
        self.given = given

    def extra_repr(self) -> str:
        coeff = self.coeff
        shown = f"{coeff.item():g}" if coeff.dim() == 0 and not coeff.is_meta else f"{tuple(coeff.shape)}"
        return f"coeff={shown}"


def keeping_precision(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A conversion that moves tensors between devices, but casts none to a half dtype."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        out = fn(tensor)
        return tensor.to(device=out.device) if out.dtype in HALF and tensor.dtype != out.dtype else out

    return convert
