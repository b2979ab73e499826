"""Draw the part of a graph around a site, as DOT text for Graphviz or as an SVG that needs nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import torch
from torch import fx

from passes.ir.module_utils import tensor_at
from passes.ir.provenance import adapter_instances, provenance_of
from passes.ir.torch_internals import schema_of

COLOURS = {
    "base": ("#dbe7f5", "base product"),
    "body": ("#fdf3d8", "adapter"),
    "out": ("#fdf3d8", "adapter"),
    "biased": ("#fdf3d8", "adapter"),
    "shared": ("#ece2f5", "shared by sites"),
    "frozen": ("#ececec", "frozen tensor"),
    "trainable": ("#d6efd6", "trainable tensor"),
    "coefficient": ("#f6d5d5", "coeff"),
    "outside": ("#ffffff", "rest of the model"),
}
WIDTH, HEIGHT, GAP_X, GAP_Y = 168, 40, 14, 34


@dataclass(frozen=True)
class Box:
    """One node of a drawing: its name, two lines of text, and what it is (a key of ``COLOURS``)."""

    name: str
    title: str
    detail: str
    kind: str


@dataclass(frozen=True)
class Drawing:
    """Boxes in the order of execution, and edges between them by name."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str], ...]

    def dot(self) -> str:
        """DOT text."""
        lines = ["digraph site {", '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];']
        for box in self.boxes:
            label = f"{box.title}\\n{box.detail}".replace('"', "'")
            lines.append(f'  "{box.name}" [label="{label}", fillcolor="{COLOURS[box.kind][0]}"];')
        lines += [f'  "{source}" -> "{target}";' for source, target in self.edges]
        return "\n".join([*lines, "}"]) + "\n"

    def svg(self) -> str:
        """A self-contained SVG: layers by longest path, boxes of a layer side by side in the order of their readers."""
        layers = _layers(self)
        rows = [[box for box in self.boxes if layers[box.name] == i] for i in range(max(layers.values()) + 1)]
        widest = max(map(len, rows))
        width = widest * (WIDTH + GAP_X) + GAP_X
        corner: dict[str, tuple[float, float]] = {}
        for i, row in enumerate(rows):
            row = sorted(row, key=lambda box: _wish(box, self, corner, width))
            left = (width - len(row) * (WIDTH + GAP_X) + GAP_X) / 2
            for j, box in enumerate(row):
                corner[box.name] = (left + j * (WIDTH + GAP_X), GAP_Y + i * (HEIGHT + GAP_Y))
        height = GAP_Y + len(rows) * (HEIGHT + GAP_Y) + 30
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="11">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#667"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
        ]
        for source, target in self.edges:
            (x0, y0), (x1, y1) = corner[source], corner[target]
            a, b, c, d = x0 + WIDTH / 2, y0 + HEIGHT, x1 + WIDTH / 2, y1
            bend = (d - b) / 2
            parts.append(
                f'<path d="M{a:.0f} {b:.0f} C{a:.0f} {b + bend:.0f} {c:.0f} {d - bend:.0f} {c:.0f} {d:.0f}" '
                'fill="none" stroke="#667" marker-end="url(#tip)"/>'
            )
        for box in self.boxes:
            x, y = corner[box.name]
            parts.append(
                f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
                f'fill="{COLOURS[box.kind][0]}" stroke="#99a"/>'
                f'<text x="{x + WIDTH / 2:.0f}" y="{y + 16:.0f}" text-anchor="middle">'
                f"{escape(_fit(box.title, 27))}</text>"
                f'<text x="{x + WIDTH / 2:.0f}" y="{y + 31:.0f}" text-anchor="middle" fill="#556" font-size="9.5">'
                f"{escape(_fit(box.detail, 32))}</text>"
            )
        kinds = {COLOURS[box.kind] for box in self.boxes}
        for i, (colour, text) in enumerate(pair for pair in dict.fromkeys(COLOURS.values()) if pair in kinds):
            x = GAP_X + i * 118
            parts.append(
                f'<rect x="{x}" y="{height - 22}" width="12" height="12" fill="{colour}" stroke="#99a"/>'
                f'<text x="{x + 17}" y="{height - 12}">{text}</text>'
            )
        return "\n".join([*parts, "</svg>"]) + "\n"


def draw_site(graph_module: fx.GraphModule, key: str) -> Drawing:
    """The nodes of a site, what they read, and what reads them.

    Raises:
        KeyError: no adapter of that key stands in the graph.
    """
    instances = adapter_instances(graph_module.graph, [key])
    if not instances:
        raise KeyError(key)
    inside = set(instances[0].nodes)
    for node in reversed(graph_module.graph.nodes):
        provenance = provenance_of(node)
        if provenance is not None and provenance.role == "shared" and any(user in inside for user in node.users):
            inside.add(node)
    readers = {user for node in inside for user in node.users} - inside
    sources = {source for node in inside for source in node.all_input_nodes} - inside
    chosen = [node for node in graph_module.graph.nodes if node in inside | readers | sources]
    pairs = [(source, node) for node in chosen for source in node.all_input_nodes if source in chosen]
    edges = [(source.name, node.name) for source, node in pairs if source in inside or node in inside]
    return Drawing(tuple(_box(graph_module, node) for node in chosen), tuple(edges))


def _box(graph_module: fx.GraphModule, node: fx.Node) -> Box:
    provenance = provenance_of(node)
    if node.op != "get_attr":
        target = schema_of(node.target)
        title = (
            target.name.replace("::", ".") if target is not None else str(getattr(node.target, "__name__", node.target))
        )
        shape = getattr(node.meta.get("val"), "shape", None)
        detail = node.name if shape is None else f"{node.name}  {tuple(map(str, shape))}".replace("'", "")
        return Box(node.name, title, detail, provenance.role if provenance else "outside")
    tensor = tensor_at(graph_module, str(node.target))
    kind = "trainable" if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad else "frozen"
    short = _end(str(node.target), 27)
    if provenance is not None and str(node.target).startswith(f"{provenance.path}."):
        short = str(node.target).removeprefix(f"{provenance.path}.")
        adapter = graph_module.get_submodule(provenance.path)
        kind = "coefficient" if short == getattr(adapter, "coefficient_name", None) else kind
    return Box(node.name, short, f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}", kind)


def _layers(drawing: Drawing) -> dict[str, int]:
    """Longest path to each box; tensors stand just above their first reader."""
    before: dict[str, list[str]] = defaultdict(list)
    after: dict[str, list[str]] = defaultdict(list)
    for source, target in drawing.edges:
        before[target].append(source)
        after[source].append(target)
    layers: dict[str, int] = {}
    for box in drawing.boxes:
        layers[box.name] = max((layers[source] + 1 for source in before[box.name]), default=0)
    for box in reversed(drawing.boxes):
        if not before[box.name] and after[box.name]:
            layers[box.name] = max(0, min(layers[target] for target in after[box.name]) - 1)
    return layers


def _wish(box: Box, drawing: Drawing, corner: dict[str, tuple[float, float]], width: float) -> float:
    """Where a box would like to stand: below the mean of what it reads; tensors to the right."""
    above: Iterable[float] = [corner[s][0] for s, t in drawing.edges if t == box.name and s in corner]
    positions = list(above)
    return sum(positions) / len(positions) if positions else width


def _end(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _fit(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
