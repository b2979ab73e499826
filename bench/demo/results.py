"""What the steps of the demo share: settings, results, logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DemoSettings:
    """Options of the demo, as on the command line."""

    model: str | None = None
    text: Path | None = None
    out: Path = Path("demo-out")
    cache: Path | None = None
    r: int = 128
    steps: int = 60
    batch: int = 16
    length: int = 128
    lr: float = 2e-2
    base_steps: int | None = None
    seed: int = 0


@dataclass
class Results:
    """Everything that one run measured."""

    model: str
    unit: str
    rows: list[tuple[str, str, bool | None]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    train_loss: list[float] = field(default_factory=list)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    sweep: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    gains: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, value: str, passed: bool | None = None) -> None:
        """Add a line to the table; ``passed`` is None where nothing is verified."""
        self.rows.append((what, value, passed))

    @property
    def passed(self) -> bool:
        """Whether every verification held."""
        return all(passed is not False for _, _, passed in self.rows)


def bits(same: bool) -> str:
    """Words for whether two results have the same bits."""
    return "equal bit for bit" if same else "DIFFERENT"
