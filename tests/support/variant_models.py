"""Models with every variant on sites of every shape, in place and in graphs, and their outputs by the reference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import surgery
from surgery import Contrast, apply_surgery, fold, set_coeff, sites, to_graph
from surgery.variants import REGISTRY, Variant
from tests.support.reference import reference_output
from tests.support.tolerance import assert_close
from tests.support.zoo import built_once

CHOSEN: tuple[Variant, ...] = (
    surgery.AntiPaSTO(),
    surgery.AntiPaSTO(suppress_only=True),
    surgery.AntiPaSTO(pool="mean_abs"),
    surgery.AntiPaSTORot(),
    surgery.AntiPaSTORot(rotate_basis="U"),
    surgery.AntiPaSTORot(rotate_basis="both"),
    surgery.AntiPaSTORot(rotate_basis="none"),
    surgery.AntiPaSTORot(block_size=1),
    surgery.AntiPaSTORot(rotate_basis="both", block_size=2, max_rotation_angle=2.0),
    surgery.AntiPaSTORot(rotate_basis="U", block_size=3, init_delta_s=0.1),
    surgery.AntiPaSTORot(rotate_basis="both", block_size=5, max_rotation_angle=1.5),
    surgery.AntiPaSTORot(block_size=8),
    surgery.AntiPaSTOAblate(),
    surgery.AntiPaSTOAblate(k=3),
    surgery.AntiPaSTOAblate(k=3, allow_amplify=True),
    surgery.AntiPaSTOAblate(k=2, cov_orient=True),
    surgery.AntiPaSTOCorDA(),
    surgery.AntiPaSTOCorDA(suppress_only=True, cov_eps_relative=True),
    surgery.AntiPaSTOASVD(),
    surgery.AntiPaSTOASVD(suppress_only=True),
    surgery.AntiPaSTOArrow(),
    surgery.AntiPaSTOArrow(block=3),
    surgery.AntiPaSTOArrow(block=3, suppress_only=True),
    surgery.AntiPaSTODPLR(),
    surgery.AntiPaSTODPLR(k=3, suppress_only=True),
    surgery.LoRAXS(),
    surgery.SSpace(),
    surgery.SSpace(gate="abs", center=True),
    surgery.SSpace(gate="norm"),
    surgery.SSpace(gate="none"),
    surgery.SSpaceScale(),
)
CONFIGS = CHOSEN + tuple(cls() for name, cls in REGISTRY.items() if name not in {config.name for config in CHOSEN})
NAMES = {f"{i:02}_{config.name}": config for i, config in enumerate(CONFIGS)}
FIRST = {config.name: name for name, config in reversed(NAMES.items())}
TOGETHER = {name: NAMES[name] for name in [*sorted(FIRST.values()), "05_antipasto_rot", "13_antipasto_ablate"]}
LINEAR = [name for name, config in NAMES.items() if config.linear]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
ROWS = (0.0, 1.0, -0.5, 0.8)
COEFFS: tuple[Any, ...] = (-1.0, 0.0, 0.5, 1.0, ROWS)
SHAPES = {"square": (12, 12, True), "tall": (9, 20, False), "wide": (16, 9, True), "full": (5, 7, False)}
FORMS = ("delta", "residual")

each = pytest.mark.parametrize("name", NAMES)
each_linear = pytest.mark.parametrize("name", LINEAR)
# configurations whose graphs have the shape of another's are traced in the full suite only
ALIKE = {
    i for i, c in enumerate(CONFIGS) if i and (getattr(c, "suppress_only", False) or c.name == CONFIGS[i - 1].name)
}
ALIKE -= {5, 8, 10, 13, 21}
GRAPHS = [pytest.param(n, marks=[pytest.mark.full] * (int(n[:2]) in ALIKE)) for n in NAMES]
each_graph = pytest.mark.parametrize("name", GRAPHS)
each_linear_graph = pytest.mark.parametrize("name", [param for param in GRAPHS if param.values[0] in LINEAR])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Slices(nn.Module):
    """Linear modules side by side, each on the first entries of the input; the output is all of theirs in a row."""

    def __init__(self, shapes: dict[str, tuple[int, int, bool]]) -> None:
        super().__init__()
        for name, (d_in, d_out, bias) in shapes.items():
            setattr(self, name, nn.Linear(d_in, d_out, bias=bias))
        self.names = tuple(shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = [getattr(self, name) for name in self.names]
        return torch.cat([module(x[..., : module.in_features]) for module in modules], dim=-1)


def some(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data_for(config: Variant, dtype: torch.dtype) -> Any:
    """Calibration data where the configuration wants it: channels of unlike size, and two sets for a contrast."""
    scales = torch.linspace(0.2, 3, 16, dtype=torch.float64)
    batches = [(some(4, 3, 16, seed=seed) * scales).to(dtype) for seed in range(4)]
    if config.statistic == "contrast":
        return Contrast([batch + 1 for batch in batches[:2]], batches[2:])
    calibrated = config.needs_calibration or getattr(config, "pool", "rms") != "rms"
    return batches if calibrated else None


def randomise(model: nn.Module) -> nn.Module:
    """Normal cores; the strengths of an ablation lie inside and outside of [0, 1]."""
    with torch.no_grad():
        for i, (_, site) in enumerate(sorted(sites(model).items())):
            for name, parameter in site.core.named_parameters():
                values = 0.7 * some(*parameter.shape, seed=i)
                if name == "alpha":
                    values = torch.tensor([0.6, 1.7, -0.4, 0.3]).roll(i)[: len(parameter)]
                parameter.copy_(values)
    return model


def operate(model: Any, config: Variant, dtype: torch.dtype, **options: Any) -> Any:
    options = {"r": 8, "target_modules": "all-linear", "progress": False, **options}
    data = data_for(config, dtype)
    return apply_surgery(model, config, example_inputs=some(4, 3, 16).to(dtype), calibration=data, **options)


def plain(shapes: dict[str, tuple[int, int, bool]], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Slices(shapes).to(dtype).eval().requires_grad_(False)


@built_once
def in_place(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One configuration on sites of every shape."""
    return randomise(operate(plain(SHAPES, dtype), NAMES[name], dtype))


@built_once
def symbolic(name: str, form: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The same, as surgery on a traced graph."""
    return randomise(operate(fx.symbolic_trace(plain(SHAPES, dtype)), NAMES[name], dtype, form=form))


def all_shapes() -> dict[str, tuple[int, int, bool]]:
    kinds = list(SHAPES.values())
    return {f"site_{name}": kinds[i % 4] for i, name in enumerate(TOGETHER)}


@functools.cache
def everything(dtype: torch.dtype) -> nn.Module:
    """A model with every variant on a site of its own."""
    model = plain(all_shapes(), dtype)
    for name, config in TOGETHER.items():
        operate(model, config, dtype, target_modules=[f"site_{name}"])
    return randomise(model)


@functools.cache
def captured(form: str, dtype: torch.dtype) -> fx.GraphModule:
    """Its graph."""
    return to_graph(everything(dtype), some(4, 3, 16).to(dtype), form=form)


@functools.cache
def captured_outputs(form: str, dtype: torch.dtype, folded: bool) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """What every site gives at each coeff, by configuration, on an input of a batch size that was not captured."""
    model = copy.deepcopy(captured(form, dtype))
    if folded:
        fold(model)
    sizes = [d_out for _, d_out, _ in all_shapes().values()]
    outputs = []
    for coeff in COEFFS:
        with torch.no_grad():
            set_coeff(model, torch.tensor(coeff, dtype=torch.float64), rows="repeat")  # several rows for each
            found = model(batch(dtype)).split(sizes, dim=-1)
        outputs.append((coeff, dict(zip(TOGETHER, found, strict=True))))
    return outputs


def batch(dtype: torch.dtype) -> torch.Tensor:
    return some(8, 5, 16, seed=11).to(dtype)


def check_output(found: torch.Tensor, site: Any, x: torch.Tensor, coeff: Any) -> None:
    assert_close(found, reference_output(site, x[..., : site.factors.Vh.shape[1]], np.array(coeff)))


def check_model(model: Any, held: dict[str, Any], dtype: torch.dtype, coeff: Any) -> None:
    """Compare every site of a model of all shapes with the reference, at the coeff that the model has."""
    with torch.no_grad():
        found = model(batch(dtype)).split([d_out for _, d_out, _ in SHAPES.values()], dim=-1)
    for (key, site), y in zip(held.items(), found, strict=True):
        check_output(y, site, batch(dtype), coeff)
        assert key in SHAPES
