"""Names of torch that begin with an underscore are used in one file, ``passes/ir/torch_internals.py``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = Path("passes/ir/torch_internals.py")

# Of nn.Module and Tensor: for subclasses and for those who take modules apart, unchanged for many releases, and with no
# public way to the same. Of Python: named tuples.
ALLOWED = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",  # tables, written without nn.Module's checks
    "_forward_hooks", "_forward_pre_hooks",
    "_apply", "_load_from_state_dict", "_save_to_state_dict",  # overridden, and called by way of super()
    "_version",  # the counter of writes
    "_replace", "_fields", "_asdict",
}  # fmt: skip
# Of other libraries and of Python, each used in one place.
FOREIGN = {
    ("exporters/checkpoint/save_and_load.py", "_attn_implementation"),  # transformers: the public name is not read back
    ("exporters/shared/functional.py", "_ParameterKind"),  # Python: the type of inspect.Parameter.KEYWORD_ONLY
    ("surgery/support/hf_config.py", "_name_or_path"),  # transformers: the only place that says whence a model came
    ("exporters/onnx/runtime.py", "_ortvalue"),
    ("surgery/hosting/other_threads.py", "_current_frames"),  # Python: documented, of sys
    ("exporters/formats/dense.py", "_attn_implementation"),
    ("exporters/peft/layers.py", "_name_or_path"),
}
# Always torch's own, whatever the object before the dot is.
TORCHS = {
    "_C", "_codegen", "_dynamo", "_erased", "_export", "_functorch", "_graph", "_inductor", "_input_nodes",
    "_is_exporting_flag", "_library", "_ops", "_orig_mod", "_prims", "_refs", "_schema", "_subclasses", "_tracer_cls",
    "_cdata",
}  # fmt: skip


def files() -> list[Path]:
    found = [path for name in ("passes", "surgery", "exporters", "bench") for path in (ROOT / name).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names with an underscore that these packages define."""
    own: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node) in ("self", "cls"):
            own.add(node.attr)
    return {name for name in own if is_private(name)} - TORCHS


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def internals(tree: ast.Module, own: set[str]) -> set[str]:
    """Names of torch's internals that a file uses."""
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            paths = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                paths = [f"{node.module}.{name}" if is_private(name) else str(node.module) for name in paths]
            used |= {path for path in paths if path.startswith("torch.") and any(map(is_private, path.split(".")))}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            operator = "aten" in (_root(node), getattr(node.value, "attr", None)) and node.attr not in TORCHS
            if (_root(node) == "torch" and not operator) or (not operator and node.attr not in own | ALLOWED):
                used.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(str(name)) and name not in own | ALLOWED:
                used.add(str(name))
    return used


def test_internals_of_torch_are_used_in_one_file():
    trees = {path: ast.parse((ROOT / path).read_text()) for path in files()}
    own = own_names(list(trees.values()))
    found = {}
    for path, tree in trees.items():
        used = {name for name in internals(tree, own) if (path.as_posix(), name) not in FOREIGN}
        if used and path != HOME:
            found[path.as_posix()] = used
    assert found == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._dynamo.backends.common as c", "torch._dynamo.backends.common"),
        ("from torch._ops import OpOverload", "torch._ops"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree"),
        ("from torch import _dynamo", "torch._dynamo"),
        ("import torch\ntorch._C.f()", "_C"),
        ("import torch\ntorch.compiler._is_exporting_flag", "_is_exporting_flag"),
        ("import torch\ntorch.nn.modules.conv._ConvNd", "_ConvNd"),
        ("def f(graph):\n    graph._codegen = 1", "_codegen"),
        ("def f(nodes):\n    return nodes[0]._erased", "_erased"),
        ("def f(target):\n    return getattr(target, '_schema', None)", "_schema"),
        ("def f(self):\n    return self._graph", "_graph"),
        ("def f(tensor):\n    return tensor._something_new", "_something_new"),
    ],
)
def test_each_way_to_an_internal_is_seen(source, expected):
    assert internals(ast.parse(source), set()) == {expected}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._to_copy.default",
        "import torch\naten = torch.ops.aten\naten._unsafe_view.default",
        "def f(module):\n    return module._parameters, module.__dict__",
        "from passes.ir import _anything",
        "class A:\n    def f(self):\n        return self._own",
    ],
)
def test_what_is_no_internal_is_let_pass(source):
    assert internals(ast.parse(source), {"_own"}) == set()
