"""What is in force within one backward: that of the forward that is recomputed, or what it sets itself meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from passes.errors import SurgeryError
from passes.ir.torch_internals import (
    LEAF_NUMBER,
    hold_during_backward,
    node_in_backward,
    recomputed_checkpoint,
    sequence_number,
)
from surgery.modules.recording_thread import this_thread
from surgery.modules.setting import Entries, Setting, find

if TYPE_CHECKING:
    from surgery.modules.setting_log import Log


def _nothing() -> None:
    """In the place of a weak reference."""


class Recomputation:
    """What is in force within one backward of one thread.

    Attributes:
        task: number of the backward.
        cores: the setting whose cores count.
        entries: what was in force from which number on while the present node's gradient is computed.
    """

    def __init__(self, log: Log, task: int, outer: Recomputation | None) -> None:
        def held() -> None:
            """Held by the backward."""

        hold_during_backward(held)
        self.running, self.log, self.task, self.outer = weakref.ref(held), log, task, outer
        self.thread, self.first = this_thread(), this_thread().recorded
        self.node = -1
        self.checkpoint: Callable[[], object] = _nothing
        self.entries: Entries = []
        self.cores = log.present

    def follow(self) -> None:
        """Go over to the node that backward is at now, and to the checkpoint that is recomputed for it."""
        node = node_in_backward()
        checkpoint = recomputed_checkpoint() if self.log.nested else None
        if node == self.node and checkpoint is self.checkpoint():
            return
        outer = self.outer
        if outer is not None and outer.first <= node != LEAF_NUMBER:  # recorded by a recomputation, which is not over
            found = find(outer.entries, node, checkpoint)
            now, self.cores = (outer.now, outer.cores) if found is None or found[0] is None else (found[0], outer.cores)
        else:
            now, self.cores = self.log.at(node, checkpoint, self)
        self.entries = [*self.entries, (sequence_number(), now)] if node == self.node else [(0, now)]
        self.node, self.checkpoint = node, _nothing if checkpoint is None else weakref.ref(checkpoint)

    @property
    def now(self) -> Setting:
        """What is in force."""
        found = self.entries[-1][1]
        assert found is not None
        return found

    def set(self, setting: Setting) -> None:
        """Let something else be in force for the rest of the recomputation."""
        self.entries.append((sequence_number(), self.log.placed(setting)))

    def scale(self, core: torch.nn.Module) -> torch.Tensor | None:
        """The lasting factor of a site."""
        scales = self.cores.scales
        return scales[core] if core in scales else core._buffers["scale"]

    def check(self, core: torch.nn.Module | None, key: str) -> None:
        """Refuse to recompute with another core than that of the forward.

        Raises:
            SurgeryError: it was written to in between.
        """
        if self.cores.snapshot is not None and self.cores.snapshot.changed(core):
            raise SurgeryError(
                f"site {key!r}: its core was written to between a forward and the backward that recomputes it "
                "(gradient checkpointing); call backward() first, or run the forward again"
            )
