"""A transformer block as graphs in which projections are fused."""

from __future__ import annotations

import torch
import torch._dynamo.testing
from torch import fx, nn

import surgery
from passes.transforms.fuse_projections import StackedRows
from surgery import apply_surgery, sites, to_graph
from surgery.variants import REGISTRY
from tests.support.zoo import built_once

aten = torch.ops.aten
RANKS = {"q": 7, "k": 5, "v": 6, "o": 4, "gate": 6, "up": 8, "down": 4}
DIALECT = lambda variant: variant != "antipasto_rot"  # noqa: E731 - whose forward reads items of a tuple


class Block(nn.Module):
    """q, k and v read one input; gate and up another; o and down one each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(12, 8),
            nn.Linear(12, 8, bias=False),
            nn.Linear(12, 8),
            nn.Linear(8, 12),
        )
        self.gate, self.up, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


def block(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Block().to(dtype).eval(), torch.randn(4, 6, 12, dtype=torch.float64).to(dtype)


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for site in sites(model).values():
        for parameter in site.core.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.4 * noise.to(parameter))
    return model


@built_once
def operated(variant: str = "antipasto", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    model, x = block(dtype)
    config, generator = REGISTRY[variant](), torch.Generator().manual_seed(2)
    calibration = None
    if config.statistic == "contrast":
        positive, negative = ([torch.randn(4, 6, 12, generator=generator).to(dtype)] for _ in range(2))
        calibration = surgery.Contrast(positive, negative)
    elif config.needs_calibration:
        calibration = [torch.randn(4, 6, 12, generator=generator).to(dtype) for _ in range(3)]
    apply_surgery(
        model, variant, r=8, rank_pattern=RANKS, target_modules=list(RANKS), example_inputs=x, calibration=calibration,
        progress=False,
    )  # fmt: skip
    return trained(model), x


@built_once
def graphs(
    variant: str = "antipasto", dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, fx.GraphModule, torch.Tensor]:
    """The graph of an operated model, the same fused, and an input; both share the cores."""
    model, x = operated(variant, dtype)
    return to_graph(model, x), to_graph(model, x, fuse=True, debug=DIALECT(variant)), x


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def products(graph: fx.GraphModule) -> int:
    return sum(node.target is aten.linear.default for node in graph.graph.nodes)


def holders(graph: fx.GraphModule) -> list[StackedRows]:
    return [module for module in graph.modules() if isinstance(module, StackedRows)]
