"""Run an exported graph in ONNX Runtime and compare it with PyTorch, output by output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exporters.onnx.onnx_program import flat_inputs
from exporters.shared.functional import COEFF
from exporters.shared.outputs import valid_positions
from passes.infra.tolerance import ELSEWHERE, relative_error
from passes.ir.torch_internals import tree_iter
from surgery.errors import ExportError

if TYPE_CHECKING:
    import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ON_CPU = (torch.float64, torch.float32, torch.float16)


def providers(dtype: torch.dtype) -> list[str]:
    """Where a graph of this dtype runs on this machine; empty if nowhere."""
    import onnxruntime

    if dtype in ON_CPU:
        return [CPU]
    return [CUDA, CPU] if dtype == torch.bfloat16 and CUDA in onnxruntime.get_available_providers() else []


def check_file(path: Path) -> None:
    """Run ``onnx.checker``.

    Raises:
        ExportError: the file is not valid.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker raises types of its own
        raise ExportError(f"the exported graph is not valid: {str(error).strip()[:300]}") from error


class Runtime:
    """A graph in ONNX Runtime, that takes and gives tensors.

    Attributes:
        inputs: names of the inputs that have no default.
        outputs: names of the outputs.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers(dtype))
        except Exception as error:  # ONNX Runtime raises types of its own
            raise ExportError(f"the exported graph is not valid: {str(error).strip()[:300]}") from error
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.dtype = dtype

    def feed(self, inputs: Mapping[str, object], coeff: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The inputs that the graph has, by name, and coeff unless it is None.

        Raises:
            ExportError: the graph wants others.
        """
        feed = {name: value for name, value in flat_inputs(inputs).items() if name in self.inputs}
        if missing := sorted(set(self.inputs) - set(feed)):
            raise ExportError(f"the exported graph has inputs that the model does not have: {', '.join(missing)}")
        if coeff is not None:
            feed[COEFF] = coeff.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        return feed

    def run(self, feed: Mapping[str, torch.Tensor], core: Path | None = None) -> list[torch.Tensor]:
        """All outputs, with the core of an ``.onnx_adapter`` file if one is given."""
        import onnxruntime

        options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()  # options do not keep an adapter alive
        if core is not None:
            adapter.Load(str(core))
            options.add_active_adapter(adapter)
        held = {name: value.detach().cpu().contiguous() for name, value in feed.items()}  # ONNX Runtime copies nothing
        given = {name: _to_runtime(value) for name, value in held.items()}
        return [_from_runtime(value) for value in self.session.run_with_ort_values(None, given, options)]


def _to_runtime(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    import onnxruntime

    if tensor.dtype != torch.bfloat16:  # which numpy does not have
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
    kind = 16  # TensorProto.BFLOAT16
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), kind)


def _from_runtime(value: onnxruntime.OrtValue) -> torch.Tensor:
    if value.data_type() != "tensor(bfloat16)":
        return torch.from_numpy(value.numpy())
    return torch.utils.dlpack.from_dlpack(value._ortvalue)


def compare_with_runtime(
    runtime: Runtime,
    run: Callable[[], object],
    inputs: Mapping[str, object],
    coeff: torch.Tensor | None = None,
    core: Path | None = None,
) -> float:
    """Compare every output in ONNX Runtime with what PyTorch gives; returns the largest relative deviation.

    Args:
        run: PyTorch, at this coeff and with this core.
        inputs: of both.
        coeff: that the graph is fed; its default if None.
        core: file of the core to use; the graph's default if None.

    Raises:
        ExportError: the results differ by more than the dtype allows.
    """
    feed = runtime.feed(inputs, coeff)
    with torch.no_grad():
        expected = [leaf for leaf in tree_iter(run()) if isinstance(leaf, torch.Tensor)]
    found = runtime.run(feed, core)
    if len(found) != len(expected):
        raise ExportError(f"the exported graph has {len(found)} outputs, the model {len(expected)}")
    pairs = zip(found, expected, strict=True)
    deviation = max(
        relative_error(valid_positions(one, inputs), valid_positions(other.cpu(), inputs)) for one, other in pairs
    )
    if not deviation <= ELSEWHERE[runtime.dtype]:
        at = "" if coeff is None else f" at coeff={coeff.tolist()}"
        raise ExportError(
            f"ONNX Runtime differs from PyTorch by {deviation:.3g} of the largest output{at}, "
            f"allowed for {runtime.dtype} is {ELSEWHERE[runtime.dtype]:.0e}"
        )
    return deviation


def coefficients(rows: int) -> list[torch.Tensor]:
    """Values of the coefficient to compare at: the default, identity, a negative one, and one per row."""
    values = [torch.tensor(value) for value in (1.0, 0.0, -0.5)]
    return values + ([torch.linspace(-1, 1, rows)] if rows > 1 else [])
