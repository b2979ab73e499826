"""What a forward that is recomputed in backward is to use: the coefficient and the cores of the forward itself.

Gradient checkpointing runs parts of a forward again, within ``backward()``, when the coefficient may be another one.
Autograd numbers the nodes that a thread records, so a log of what was in force from which number on says what the
forward of any node used: in a backward, the number of the node that it is at is looked up. Numbers are a thread's own;
where the logs of several threads disagree about a number, it is an error.

A function that is checkpointed may steer within itself. Recomputed, it does so again: what is set within a backward
holds for the rest of that recomputation, and nowhere else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from passes.errors import SurgeryError
from passes.ir.torch_internals import LEAF_NUMBER, backward_task, checkpoints_within, sequence_number
from surgery.modules.recomputation import Recomputation
from surgery.modules.recording_thread import Thread, this_thread
from surgery.modules.setting import CoreVersions, Entries, Setting, find

KEPT = 32  # settings of forwards that left no graph behind, as far as can be seen
OTHER_THREADS = 8  # whose settings are kept after they have ended


class Lane:
    """What was in force in one thread.

    Attributes:
        until: the number of the first node after all that are known to be recorded by a site; 0 where none was, and
            infinite after a part of the root was called by itself.
    """

    def __init__(self, thread: Thread, entries: Entries) -> None:
        self.thread, self.entries, self.until = weakref.ref(thread), entries, 0.0

    def prune(self) -> None:
        """Forget what no graph can need any more, but for the last few, of whose graphs not all may have been seen."""
        if len(self.entries) <= KEPT:
            return
        kept: Entries = []
        for start, setting in self.entries[:-KEPT]:
            setting = setting if setting is not None and setting.needed() else None
            if setting is not None or not kept or kept[-1][1] is not None:
                kept.append((start, setting))
        self.entries = kept + self.entries[-KEPT:]


class Log:
    """What was in force in the forwards of a root.

    Attributes:
        present: what is in force outside of a backward.
        nested: whether anything was ever set within a non-reentrant checkpoint.
    """

    def __init__(self, present: Setting, start: int) -> None:
        self.present, self.nested = present, False
        self.lanes = [Lane(this_thread(), [(start, present)])]
        self.running: weakref.WeakSet[Recomputation] = weakref.WeakSet()
        self._local, self._lock = threading.local(), threading.Lock()

    def lane(self) -> Lane:
        """That of this thread."""
        me = this_thread()
        for lane in self.lanes:
            if lane.thread() is me:
                return lane
        with self._lock:
            mine = Lane(me, [(0, self.present)])
            ended = [lane for lane in self.lanes if lane.thread() is None]
            free = [lane for lane in ended if not any(s is not None and s.needed() for _, s in lane.entries)]
            gone = free[:-OTHER_THREADS]
            self.lanes = [*(lane for lane in self.lanes if lane not in gone), mine]
        return mine

    def change(self, setting: Setting) -> None:
        """Let something else be in force from now on."""
        self._append(self.placed(setting))

    def placed(self, setting: Setting) -> Setting:
        """A setting with the checkpoints that this thread is within, which set it again when they are recomputed."""
        within = tuple(map(weakref.ref, checkpoints_within()))
        self.nested |= bool(within)
        return replace(setting, within=within) if within != setting.within else setting

    def renew(self, snapshot: CoreVersions) -> None:
        """Note that cores were written to."""
        self._append(replace(self.present, snapshot=snapshot, graph=None))

    def _append(self, setting: Setting) -> None:
        lane, number = self.lane(), sequence_number()
        start, last = lane.entries[-1]
        if start == number and last is not None and last.within == setting.within:  # nothing was recorded under it
            lane.entries.pop()
        lane.entries.append((number, setting))
        lane.prune()
        self.present, this_thread().recorded = setting, number

    def touch(self) -> None:
        """Note that this thread records nodes with what is in force, until :meth:`hold` is called."""
        lane = self.lane()
        this_thread().recorded, lane.until = sequence_number(), float("inf")
        if lane.entries[-1][1] is not self.present:
            lane.entries.append((sequence_number(), self.present))
            lane.prune()

    def at(self, number: int, checkpoint: object, asking: Recomputation) -> tuple[Setting, Setting]:
        """What was in force when a node was recorded, and the setting that knows the cores.

        Raises:
            SurgeryError: it is not known, or the logs of several threads disagree.
        """
        if number == LEAF_NUMBER:  # a forward of a hook's own
            return self.present, self.present
        me = this_thread()
        own = next((lane for lane in self.lanes if lane.thread() is me and number < sequence_number()), None)
        lanes = [lane for lane in self.lanes if lane.thread() is not me and number < lane.until]
        if own is not None and (own.until or not lanes):
            lanes.append(own)
        found = [find(lane.entries, number, checkpoint) for lane in lanes]
        for other in self.running:
            if other.task != asking.task and other.thread is not me and other.running() is not None:
                found.append((other.now, other.cores))
        known = [pair for pair in found if pair is not None]
        if not known or any(now is None for now, _ in known):
            raise SurgeryError(
                "a forward is recomputed in backward (gradient checkpointing), but the coefficient that it ran with is "
                "not known any more: it ran in another thread, or the coefficient has changed many times since; call "
                "backward() sooner, or in the thread of the forward"
            )
        now, cores = known[-1]
        assert now is not None
        assert cores is not None
        for other_now, other_cores in known:
            if not (other_now and now.like(other_now) and other_cores and cores.snapshot is other_cores.snapshot):
                raise SurgeryError(
                    "a forward is recomputed in backward (gradient checkpointing), and threads ran this model with "
                    "different coefficients, so that it cannot be told which was its own; run forward and backward "
                    "in the thread that steers, or give each thread a copy.deepcopy of the model"
                )
        return now, cores

    def recall(self) -> Recomputation | None:
        """What a forward within a backward is to use; None outside of any backward."""
        task = backward_task()
        if task == -1:
            return None
        found: list[Recomputation] = vars(self._local).setdefault("found", [])
        while found and (found[-1].running() is None or (found[-1].task != task and _has(found, task))):
            found.pop()
        if not found or found[-1].task != task:
            found.append(Recomputation(self, task, found[-1] if found else None))
            self.running.add(found[-1])
        found[-1].follow()
        return found[-1]

    def settings(self) -> Iterable[Setting]:
        """All that are remembered."""
        return {id(s): s for lane in self.lanes for _, s in lane.entries if s is not None}.values()

    def hold(self, outputs: Sequence[torch.Tensor], since: int) -> None:
        """Keep what was in force since a number for as long as the graphs of these outputs are there."""
        lane = self.lane()
        this_thread().recorded = lane.until = sequence_number()
        for start, setting in reversed(lane.entries):
            if setting is not None:
                graph = setting.held()
                for output in outputs:
                    node: Any = output.grad_fn
                    node.metadata[graph] = None
            if start <= since:
                break


def _has(found: list[Recomputation], task: int) -> bool:
    return any(one.task == task for one in found)
