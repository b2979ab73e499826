"""A coefficient by row in ONNX graphs: wherever the rows lie in the inputs of sites, or one coefficient for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from exporters import export
from passes.infra.tolerance import ELSEWHERE, relative_error
from surgery import steer
from tests.support.row_models import LAYOUTS, REFUSED, WIDTH, one_by_one, operated


def run(path: Path, x: torch.Tensor, coeff: np.ndarray) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy(), "coeff": coeff})[0])


@pytest.mark.parametrize("name", ["sequence_first", "flattened", pytest.param("interleaved", marks=pytest.mark.full)])
def test_rows_of_a_live_graph(name: str, tmp_path: Path) -> None:
    kind, _, _ = LAYOUTS[name]
    model = operated(kind)
    path = export(model, "onnx", tmp_path, mode="live", example_inputs=torch.randn(3, 5, WIDTH)).path
    for batch, length in ((3, 5), (4, 4), (2, 7)):
        x, coeffs = torch.randn(batch, length, WIDTH), torch.linspace(-1, 1.5, batch)
        with torch.no_grad(), steer(model, coeffs):
            expected = one_by_one(model, coeffs, lambda m, x=x: m(x.double()))
            assert relative_error(run(path, x, coeffs.numpy()), expected) < ELSEWHERE[torch.float32]


@pytest.mark.parametrize("name", ["across_rows", pytest.param("positions", marks=pytest.mark.full)])
def test_a_graph_whose_rows_are_not_known_takes_one_coefficient(name: str, tmp_path: Path) -> None:
    model, x = operated(REFUSED[name][0]), torch.randn(4, 5, WIDTH)
    path = export(model, "onnx", tmp_path, mode="live", example_inputs=x).path
    with torch.no_grad(), steer(model, -0.5):
        expected = model(x)
    assert relative_error(run(path, x, np.array(-0.5, np.float32)), expected) < ELSEWHERE[torch.float32]
    with pytest.raises(Exception, match=r"coeff|shape|dimension|broadcast"):
        run(path, x, np.linspace(-1, 1, 4, dtype=np.float32))
