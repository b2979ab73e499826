"""The cost of one variant, measured in a process of its own, that ``bench.cost.run`` starts: SETTINGS NAME ROW.

The model is loaded and run once, and peaks of memory count from there. The base that a variant is timed beside is a
frozen copy of the model's modules on the same weights, so that it takes no memory of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common.load_model import device_name, device_of, inputs_for, load, varied
from bench.common.memory import Meter, held_by
from bench.common.runs import forward, lowerings, products, shadow, step
from bench.common.timing import milliseconds, paired, settled
from passes.capture.capture import default_inputs
from passes.ir.forward_context import Call
from surgery import Contrast, apply_surgery, inspect_sites, merge, report, save_adapter, sites
from surgery.hosting.state import trainable_parameters
from surgery.variants import REGISTRY, Variant

BASE, FULL = "base", "full fine-tuning"
CALIBRATION = 2  # batches
Stage = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class CostSettings:
    """What every variant is measured with, as on the command line."""

    model: str
    config_only: bool = False
    r: int = 256
    target_modules: str | list[str] | None = None
    lowering: str = "auto"
    batch: int = 1
    length: int = 512
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 15
    seed: int = 0


class Measurement:
    """One row of the report, filled stage by stage.

    Attributes:
        row: what was found so far.
    """

    def __init__(self, settings: CostSettings, name: str) -> None:
        self.settings, self.name = settings, name
        self.row: dict[str, Any] = {"variant": name, "settings": asdict(settings)}

    def run(self, tell: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
        """Measure everything; what fails is named in ``row["error"]``, and what does not need it still runs.

        Args:
            tell: called with the name of each stage before it begins.
        """
        errors = []
        for stage, run in self._stages():
            self.row["stage"] = stage
            tell(stage)
            try:
                run()
            except Exception as error:  # whatever a variant or a device refuses is what the row has to say
                errors.append(f"{stage}: {described(error)}")
                if stage in ("loading", "initialisation"):
                    break
        else:
            self.row["stage"] = "done"
        if errors:
            self.row["error"] = "; ".join(errors)
        return self.row

    def _stages(self) -> list[Stage]:
        yours = [("loading", self._load)]
        if self.name in REGISTRY:
            yours += [("initialisation", self._operate), ("adapter file", self._save)]
        else:
            yours += [("initialisation", self._plain)]
        yours += [("forward", self._forward), ("forward and backward", self._step)]
        if self.name in REGISTRY:
            yours += [("merge", self._merge)] * REGISTRY[self.name].linear
        return yours

    def _load(self) -> None:
        s = self.settings
        self.device = device_of(s.device)
        self.model, given = load(s.model, config_only=s.config_only, device=self.device, dtype=s.dtype, seed=s.seed)
        self.call = inputs_for(self.model, given, s.batch, s.length, s.seed)
        self.base = shadow(self.model.requires_grad_(False))
        self.base_forward, self.base_step = forward(self.base, self.call), step(self.base, self.call)
        config = REGISTRY[self.name](r=4) if self.name in REGISTRY else None
        if config:  # what is imported and set up once counts as no cost of a variant
            inspect_sites(self.model, self._example())
        rehearse(config, self.device, next(self.model.parameters()).dtype)
        for run in (self.base_forward, self.base_step):
            run()
        parameters = {id(p): p for p in self.model.parameters()}.values()
        self.row["model"] = {
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.nbytes for p in parameters),
            "dtype": str(next(iter(parameters)).dtype).removeprefix("torch."),
            "device": device_name(self.device),
            "sized": given is None,
        }
        self.meter = Meter(self.device)
        self.row["memory"], self.row["peak_bytes"] = self.meter.how, self.meter.peaks
        self.row["milliseconds"] = {}

    def _example(self) -> Any:
        """What the model is captured with: its own small inputs, where it has some."""
        if self.settings.lowering != "measure" and default_inputs(self.model) is not None:
            return None
        return written(self.call)

    def _plain(self) -> None:
        if self.name == FULL:
            self.model.requires_grad_(True)
            self.row["file_bytes"] = self.row["model"]["bytes"]
        self.row |= {"sites": 0, "trainable": trainable_parameters(self.model)[0]}

    @settled()
    def _operate(self) -> None:
        s, config = self.settings, REGISTRY[self.name](r=self.settings.r)
        calibration = calibration_for(config, self.call, s.seed)

        def run() -> None:
            apply_surgery(
                self.model, config, target_modules=s.target_modules, example_inputs=self._example(),
                calibration=calibration, lowering=s.lowering, seed=s.seed, progress=False,
            )  # fmt: skip

        with self.meter.peak("initialisation"):
            self.row["milliseconds"]["initialisation"] = milliseconds(run, self.device)
        disturb(self.model, s.seed)
        found = report(self.model)
        self.row |= {
            "sites": len(found.sites),
            "trainable": found.trainable,
            "macs": sum(site.macs for site in found.sites),
            "base_macs": sum(site.base_macs for site in found.sites),
        }

    def _save(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = save_adapter(self.model, Path(folder) / "adapter")
            self.row["file_bytes"] = sum(file.stat().st_size for file in Path(path).iterdir())

    def _forward(self) -> None:
        self._measure("forward", forward(self.model, self.call), self.base_forward)

    def _step(self) -> None:
        self._measure("step", step(self.model, self.call), self.base_step)

    @settled()
    def _measure(self, kind: str, run: Callable[[], Any], base: Callable[[], Any]) -> None:
        """Peak, lowerings, time beside the base, and products."""
        with self.meter.peak(kind):
            for _ in range(2):
                milliseconds(run, self.device)
        self.row.setdefault("lowering", {})[kind] = lowerings(self.model, run)
        found = paired({"base": base, "this": run}, self.settings.repeats, self.device)
        self.row["milliseconds"][kind] = found["this"]
        self.row.setdefault("flops", {})[kind] = [products(run, self.device), products(base, self.device)]
        if self.name in REGISTRY:
            self.row["held_bytes"] = held_by(self.model)  # last of the two kinds: with what both keep

    @settled()
    def _merge(self) -> None:
        self.row["milliseconds"]["merge"] = milliseconds(lambda: merge(self.model) and None, self.device)


def written(call: Call) -> Any:
    """A call as example inputs are written."""
    args, kwargs = call
    return kwargs or args


def calibration_for(config: Variant, call: Call, seed: int) -> Any:
    """Calibration data for a variant that needs some, else None: the inputs, and others of their kind."""
    if not config.needs_calibration:
        return None
    batches = [written(call), *(varied(call, seed + i) for i in range(1, CALIBRATION))]
    if config.statistic == "contrast":
        return Contrast(batches[:1], batches[1:], pool="all")
    return batches


def rehearse(config: Variant | None, device: torch.device, dtype: torch.dtype) -> None:
    """Go through everything that is measured, on a model of one small weight, operated on or plain."""
    model = nn.Sequential(nn.Linear(8, 8, device=device, dtype=dtype))
    call: Call = ((torch.randn(4, 8, device=device, dtype=dtype),), {})
    if config:
        apply_surgery(
            model, config, target_modules=["0"], example_inputs=written(call), progress=False,
            calibration=calibration_for(config, call, 0),
        )  # fmt: skip
    for run in (forward(model, call), step(model, call)):
        run()
        products(run, device)
    if config and config.linear:
        merge(model)


def disturb(model: nn.Module, seed: int) -> None:
    """Move every core away from its start: at identity, a change of a gain by a factor would be none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(model).values():
            for p in site.core.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator).to(p)


def described(error: BaseException) -> str:
    """An error in one line."""
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return f"out of memory ({reason})"
    return f"{type(error).__name__}: {reason}"


def main() -> None:
    """Measure one variant; the row is written after every stage, so that a killed process leaves what it found."""
    settings, name, path = CostSettings(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
    stages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for a stage
    warnings.simplefilter("ignore")
    measurement = Measurement(settings, name)

    def tell(stage: str) -> None:
        path.write_text(json.dumps(measurement.row))
        print(stage, file=stages)

    path.write_text(json.dumps(measurement.run(tell)))


if __name__ == "__main__":
    main()
