"""What was in force in the forwards of a root, for those that gradient checkpointing runs again in backward."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn

from passes.ir.torch_internals import backward_task, checkpoints_within, sequence_number
from surgery.modules.recomputation import Recomputation
from surgery.modules.recording_thread import Thread, this_thread
from surgery.modules.setting import CoreVersions, Setting
from surgery.modules.setting_log import Log

COUNTER = itertools.count(1)
OWN = ("log", "handle", "recorded", "_began", "_numbers")  # of one instance, and of no copy
STEERINGS: weakref.WeakValueDictionary[int, RecordedCoefficient] = weakref.WeakValueDictionary()


class RecordedCoefficient(nn.Module):
    """The part of :class:`surgery.modules.steering.Steering` that notes its changes in a log."""

    coeff: torch.Tensor
    rows: str
    copies: dict[tuple[int, torch.device], torch.Tensor]
    look: Callable[[], CoreVersions] | None
    _number: tuple[torch.Tensor, int, float] | None

    def _begin_log(self) -> None:
        self.given: object = None
        self.log: Log | None = None
        self.recorded, self._began = False, (weakref.ref(this_thread()), sequence_number())
        self._numbers: weakref.WeakKeyDictionary[Thread, int] = weakref.WeakKeyDictionary()
        self._numbers[this_thread()] = sequence_number()
        number = next(COUNTER)
        self.handle = torch.tensor(number)
        STEERINGS[number] = self

    def refresh_copies(self, *, anew: bool = False) -> None:
        """Bring the copies on other devices up to date."""
        raise NotImplementedError

    def remember(self) -> None:
        """Take what the buffers hold for what was written."""
        raise NotImplementedError

    def begin_change(self) -> bool:
        """Whether what is in force may be held by a graph, so that a change needs tensors of its own."""
        number = sequence_number()
        anew = self.recorded or number != self._numbers.get(this_thread(), 0) or bool(checkpoints_within())
        if anew and self.log is None:
            self.log = self._new_log()
        return anew

    def begin_scales(self, cores: Iterable[nn.Module]) -> bool:
        """Remember the lasting factors of sites, before they are changed; whether they need new tensors."""
        anew = self.begin_change()
        if self.log is not None:
            for setting, core in itertools.product(self.log.settings(), cores):
                setting.scales.setdefault(core, core._buffers["scale"])
        if anew:  # the coefficient goes on, as a tensor that may be written to
            with torch.inference_mode(False), torch.no_grad():
                self._buffers.update({n: None if t is None else t.clone() for n, t in self._buffers.items()})
                self.refresh_copies(anew=True)
            self.remember()
            if self._number is not None:
                self._number = self.coeff, self.coeff._version, self._number[2]
        return self.log is not None  # a factor may be older than the last change

    def end_change(self) -> None:
        """Note a change in the log."""
        self.recorded = False
        self._numbers[this_thread()] = sequence_number()
        if self.log is not None:
            self.log.change(self._setting())

    def _new_log(self) -> Log:
        thread, start = self._began
        return Log(self._setting(), start if thread() is this_thread() else 0)

    def _setting(self, *, known: bool = False) -> Setting:
        """What the buffers say."""
        snapshot = None if self.log is None else self.log.present.snapshot
        coeff, second = self._buffers["coeff"], self._buffers["second"]
        assert coeff is not None
        number = self._number[2] if self._number is not None and self._number[0] is coeff else None
        return Setting(coeff, second, dict(self.copies), self.rows, known, self.given, number, snapshot=snapshot)

    def record(self, snapshot: CoreVersions) -> None:
        """Note that this thread records nodes with what is in force, and with which cores."""
        if self.log is None:
            self.log = self._new_log()
        self.recorded = True
        if self.log.present.snapshot is not snapshot:
            self.log.renew(snapshot)
        self.log.touch()

    def record_part(self, core: nn.Module) -> None:
        """Note that a site is run outside of a call of the root, which would look at all cores."""
        if backward_task() != -1 or self.look is None:
            return
        found = None if self.log is None else self.log.present.snapshot
        self.record(self.look() if found is None or found.changed(core) else found)

    def recall(self) -> Recomputation | None:
        """What a forward within a backward is to use; None outside of any, where it is what the buffers say."""
        return None if self.log is None else self.log.recall()

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """The coefficient of the forward that is recomputed, to a graph, which reads it by its name."""
        if name == "coeff" and not torch.compiler.is_compiling():
            recalled = self.recall()
            if recalled is not None:
                return recalled.now.coeff
        return super().__getattr__(name)

    def set_setting(self, setting: Setting) -> None:
        """Within a backward: let something else be in force for the rest of the recomputation."""
        if self.log is None:
            self.log = self._new_log()
        found = self.log.recall()
        assert found is not None
        found.set(setting)

    def begin_call(self, coeff: torch.Tensor, second: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        """Let rows or tokens be those of one call of the root.

        Returns:
            What :meth:`end_call` puts back.
        """
        before = dict(self._buffers)
        self._buffers.update(coeff=coeff, second=second)
        try:
            self._change_for_call(known=True)
        except BaseException:
            self.end_call(before)
            raise
        return before

    def end_call(self, before: dict[str, torch.Tensor | None]) -> None:
        """Put back what was in force before a call of the root."""
        self._buffers.update(before)
        self._change_for_call(known=False)

    def _change_for_call(self, *, known: bool) -> None:
        recorded = torch.is_grad_enabled()
        self.refresh_copies(anew=recorded)
        if recorded and self.log is not None:
            self.log.change(self._setting(known=known))
