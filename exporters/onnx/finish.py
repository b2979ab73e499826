"""What is done to a converted graph before it is written: defaults, names of sizes, no tensor twice, no traces."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from exporters.onnx.adapter_inputs import AdapterInput
from exporters.onnx.onnx_program import flat_inputs
from exporters.shared.functional import COEFF
from exporters.shared.publish import part_name

if TYPE_CHECKING:
    import onnx_ir

Axes = Mapping[str, Mapping[int, str]]  # names of free sizes, by input and axis
PROTOBUF_LIMIT = 2 * 10**9
SYMBOL = re.compile(r"\b[su]\d+\b")


def finish(
    graph: onnx_ir.Model, inputs: Mapping[str, object], extra: Sequence[AdapterInput] = (), axes: Axes | None = None
) -> int:
    """Make a converted graph fit to be written.

    Args:
        inputs: that it was captured with, by name.
        axes: names of free sizes, as ``{input: {axis: name}}``; found by position where none are given.

    Returns:
        The number of tensors that were there twice.
    """
    for one in extra:
        _give_default(graph.graph, one)
    _name_sizes(graph.graph, inputs, axes or {}, {one.name for one in extra})
    _spell_out_elu(graph.graph)
    shared = merge_equal_tensors(graph.graph)
    _drop_traces(graph)
    return shared


def _spell_out_elu(graph: onnx_ir.Graph) -> None:
    """Write elu in float64, which ONNX Runtime lacks, as ``max(x, 0) + (exp(min(x, 0)) - 1)``."""
    import onnx_ir

    for node in [node for node in graph if node.op_type == "Elu"]:
        (x,), alpha = node.inputs, node.attributes.get("alpha")
        if x.dtype != onnx_ir.DataType.DOUBLE or (alpha is not None and alpha.as_float() != 1):
            continue
        tape = onnx_ir.tape.Tape(graph)
        zero = tape.initializer(onnx_ir.tensor(np.float64(0), name=f"{node.name}_zero"))
        one = tape.initializer(onnx_ir.tensor(np.float64(1), name=f"{node.name}_one"))
        small = tape.op("Sub", [tape.op("Exp", [tape.op("Min", [x, zero])]), one])
        out = tape.op("Add", [tape.op("Max", [x, zero]), small])
        nodes = list(tape.nodes)
        graph.remove(nodes)
        for i, made in enumerate(nodes):  # named, so that two exports are equal
            made.name = f"{node.name}_{i}"
            made.outputs[0].name = f"{node.outputs[0].name}_{i}"
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [out])


def _give_default(graph: onnx_ir.Graph, given: AdapterInput) -> None:
    """Register an input's default, which makes it one that may be left out."""
    import onnx_ir

    value = next(value for value in graph.inputs if value.name == given.name)
    wanted = onnx_ir.tensor(given.default.cpu().numpy(), name=given.name)
    if value.dtype != wanted.dtype:  # transformers casts every input to the model's dtype
        for node in list(value.consumers()):
            if node.op_type == "Cast" and node.attributes["to"].as_int() == wanted.dtype:
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)
        value.dtype = wanted.dtype
    # coeff is declared as a number: ONNX Runtime then takes a number, (1,) or (batch,), and the graph reshapes it
    value.shape = onnx_ir.Shape(given.default.shape)
    value.const_value = wanted
    graph.register_initializer(value)


def _name_sizes(graph: onnx_ir.Graph, inputs: Mapping[str, object], axes: Axes, extra: set[str]) -> None:
    """Name the free sizes, which the capture calls s72 and the like: "batch", "sequence", else by input and axis."""
    import onnx_ir

    rows = {tuple(leaf.shape)[:1] for leaf in flat_inputs(inputs).values() if leaf.dim()}
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or () if value.name not in extra else ()):
            if SYMBOL.fullmatch(str(size)) and str(size) not in names:
                first = {0: "batch", 1: "sequence"}.get(axis, "")
                shared = axis == 0 and len(rows) == 1  # all inputs have the rows of one batch
                free = first and first not in names.values()
                found = first if shared or free else f"{value.name}_{axis}"
                names[str(size)] = axes.get(value.name, {}).get(axis, found)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None and value.name != COEFF:
            sizes = [SYMBOL.sub(lambda m: names.get(m[0], m[0]), str(size)) for size in value.shape]
            value.shape = onnx_ir.Shape([int(size) if size.isdigit() else size for size in sizes])


def merge_equal_tensors(graph: onnx_ir.Graph) -> int:
    """Let equal constants be one, and a transposed copy be a ``Transpose`` of the other; returns how many went.

    ``torch.onnx`` stores the weight of a linear operation transposed, so that a matrix with two readers may be there
    twice. ONNX Runtime transposes constants once, when it loads a graph.
    """
    import onnx_ir

    groups: dict[object, list[onnx_ir.Value]] = defaultdict(list)
    fixed = {id(value) for value in (*graph.inputs, *graph.outputs)}
    gone = 0
    for value in list(graph.initializers.values()):
        if id(value) in fixed or value.const_value is None:
            continue
        bits = _bits(value.const_value)
        # the sum of all bit patterns is the same in any order, which finds candidates in one pass
        key = value.const_value.dtype, tuple(sorted(bits.shape)), int(bits.sum(dtype=np.uint64))
        for other in groups[key]:
            first = _bits(other.const_value)
            if bits.shape == first.shape and np.array_equal(bits, first):
                value.replace_all_uses_with(other)
            elif bits.ndim == 2 and bits.shape == first.shape[::-1] and np.array_equal(bits, first.T):
                node = onnx_ir.node("Transpose", [other], {"perm": [1, 0]})
                graph.insert_before(graph[0], node)
                value.replace_all_uses_with(node.outputs[0])
                node.outputs[0].name = f"{value.name}_shared"
            else:
                continue
            del graph.initializers[value.name]
            gone += 1
            break
        else:
            groups[key].append(value)
    return gone


def _bits(tensor: onnx_ir.TensorProtocol) -> npt.NDArray[np.unsignedinteger]:
    array = np.asarray(tensor.numpy())
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    if array.dtype.itemsize not in kinds:  # complex numbers
        array = np.stack([array.real, array.imag], axis=-1)
    return array.view(kinds[array.dtype.itemsize])


def _drop_traces(graph: onnx_ir.Model) -> None:
    """Drop stack traces and inferred shapes, which hold paths and change by the run."""
    import onnx_ir

    for part in (graph.graph, *graph.functions.values()):
        kept = {id(v) for v in (*part.inputs, *part.outputs)}
        kept |= {id(v) for v in getattr(part, "initializers", {}).values()}
        part.metadata_props.clear()
        for node in onnx_ir.traversal.RecursiveGraphIterator(part):
            node.metadata_props.clear()
            node.doc_string = None
            for output in node.outputs:
                output.metadata_props.clear()
                if id(output) not in kept:
                    output.shape, output.type = None, None
        for value in (*part.inputs, *part.outputs, *getattr(part, "initializers", {}).values()):
            value.metadata_props.clear()
    graph.metadata_props.clear()


def save(graph: onnx_ir.Model, path: Path) -> int:
    """Write a graph, with its tensors in a file beside it where one file cannot hold them; returns all bytes."""
    import onnx_ir

    tensors = [v.const_value for v in graph.graph.initializers.values() if v.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) <= PROTOBUF_LIMIT:
        onnx_ir.save(graph, path)
        return path.stat().st_size
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    data = path.with_name(part_name(path.name, digest.hexdigest()))
    onnx_ir.save(graph, path, external_data=data.name)
    return path.stat().st_size + data.stat().st_size


def written_size(graph: onnx_ir.Model, beside: Path) -> int:
    """The bytes that a graph takes as files; nothing stays."""
    with tempfile.TemporaryDirectory(dir=beside.parent) as temporary:
        return save(graph, Path(temporary) / beside.name)


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors as they are stored, each once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
