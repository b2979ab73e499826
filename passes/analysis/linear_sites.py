"""Find the linear sites of a model: the matrix products whose one operand is a parameter, and what is known of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from passes.analysis.matmul_rules import ACTIVATIONS, Product, aten, parameters_read, read_product
from passes.analysis.operands import Matrices
from passes.analysis.residual_stream import residual_writers, strip_views
from passes.analysis.weight_contractions import CONVOLUTIONS, is_unfolded, unfolded
from passes.ir.linear_modules import linear_layout
from passes.ir.module_utils import attribute
from passes.ir.parameter_names import ParameterNames, tensor_name
from passes.ir.torch_internals import Convolution


@dataclass(frozen=True)
class Site:
    """One linear operation of the model, ``y = x W^T + b``.

    Attributes:
        key: path of the module that owns the weight, or of the parameter where none does.
        weight: name of the weight parameter, as in ``named_parameters``.
        bias: name of the bias parameter, or None.
        layout: "out_in" (``nn.Linear``) or "in_out" (GPT-2's ``Conv1D``, ``x @ w``).
        d_out, d_in: sizes of the product.
        group: sites with the same number read the same input.
        tied: other names or uses of the same weight.
        residual: whether the output is added to the residual stream; None if unknown.
        calls: products of this site in one forward.
        operation: ATen name of the product; None if unknown.
        stack: number of matrices in the weight (experts, heads), each with factors and a core of its own; None for one.
        rows: first row, and the one after the last, of a site that is a part of a packed weight; None for a whole one.
    """

    key: str
    weight: str
    bias: str | None
    layout: str
    d_out: int
    d_in: int
    group: int | None = None
    tied: tuple[str, ...] = ()
    residual: bool | None = None
    calls: int = 1
    operation: str | None = None
    stack: int | None = None
    rows: tuple[int, int] | None = None

    def parameter_of(self, model: nn.Module) -> torch.Tensor:
        """The parameter of a model that holds the weight, also where it is parametrised."""
        path, _, local = self.weight.rpartition(".")
        owner = model.get_submodule(path)
        if not parametrize.is_parametrized(owner, local):
            return owner.get_parameter(local)
        original = owner.get_submodule(f"parametrizations.{local}").original
        assert isinstance(original, torch.Tensor)
        return original

    def weight_of(self, model: nn.Module) -> torch.Tensor:
        """The weight in a model: the parameter, or of a part a view of its rows."""
        return part_of(self.parameter_of(model), self.rows)


def part_of(weight: torch.Tensor, rows: tuple[int, int] | None) -> torch.Tensor:
    """Some rows of a weight, or all of it."""
    return weight if rows is None else weight[rows[0] : rows[1]]


def parts(site: Site, model: nn.Module) -> list[Site]:
    """The q, k and v of the packed projection of ``nn.MultiheadAttention`` as sites; empty for any other site."""
    path, _, local = site.weight.rpartition(".")
    owner = attribute(model, path) if path else model
    if local != "in_proj_weight" or not isinstance(owner, nn.MultiheadAttention):
        return []
    size = owner.embed_dim
    whole = replace(
        site, bias=None if owner.in_proj_bias is None else site.weight.removesuffix("weight") + "bias",
        layout="out_in", d_out=size, d_in=size, stack=None, group=None,
    )  # fmt: skip
    return [replace(whole, key=f"{site.key}.{n}", rows=(i * size, (i + 1) * size)) for i, n in enumerate("qkv")]


@dataclass(frozen=True)
class Skipped:
    """A product that is no site.

    Attributes:
        where: the module that it stands in, or its node; of a weight that is read in several, its key.
        operation: what it is.
        reason: why it is no site.
        weights: names of the parameters of two or more dimensions that it reads.
    """

    where: str
    operation: str
    reason: str
    weights: tuple[str, ...] = ()


def products_by_site(
    graph_module: fx.GraphModule, names: ParameterNames
) -> tuple[dict[str, list[Product]], list[Skipped]]:
    """Read the products off a normalised graph by the key of their site, and those that are no site.

    Args:
        graph_module: the captured graph; its ``get_attr`` targets are the model's parameter names.
        names: of the model's parameters and of the graph's, for owners.
    """
    products: dict[str, list[Product]] = defaultdict(list)
    skipped = []
    for node in graph_module.graph.nodes:
        product, path = read_product(node, names.tensors.get), _module_path(node)
        if node.op == "call_module" and isinstance(names.modules.get(str(node.target)), OPAQUE):
            product = _module_product(node, names)
        elif isinstance(product, Product) and isinstance(names.modules.get(path or ""), RECURRENT):
            product = "its products are inside one module, which holds its weights twice"
        if isinstance(product, Product):
            products[names.key(product.weight, path)].append(product)
        elif isinstance(product, str):
            weights = _weights_of(node, product, names)
            skipped.append(Skipped(path or node.name, _operation(node), product, weights))
    for key, of_site in list(products.items()):
        reason = ""
        if len({p.layout for p in of_site}) > 1:
            reason = "its weight is used both as it is and transposed"
        elif len({_matrices(p, names) for p in of_site}) > 1:
            reason = "its products see its weight as different matrices"
        if reason:
            skipped.append(Skipped(key, "linear", reason, (of_site[0].weight,)))
            del products[key]
    return products, skipped


def _weights_of(node: fx.Node, reason: str, names: ParameterNames) -> tuple[str, ...]:
    """The matrices that a product reads which is no site, by their names."""
    if reason == ACTIVATIONS:
        return ()
    if node.op == "call_module":
        owned = names.modules[str(node.target)].named_parameters(recurse=False, remove_duplicate=False)
        return tuple(f"{node.target}.{local}" for local, tensor in owned if tensor.dim() > 1)
    return tuple(name for name in parameters_read(node, names.tensors.get) if names.tensors[name].dim() > 1)


def _matrices(product: Product, names: ParameterNames) -> Matrices:
    """How a product sees its weight."""
    if product.matrices is not None:
        return product.matrices
    rows, columns = names.tensors[product.weight].shape
    return Matrices(None, *((rows, columns) if product.layout == "out_in" else (columns, rows)), product.layout)


def _module_product(node: fx.Node, names: ParameterNames) -> Product | str:
    """The product of a module that a symbolic trace does not look into, or why there is none."""
    path = str(node.target)
    module, weight = names.modules[path], f"{path}.weight"
    single = is_unfolded(module)
    if single is not True:
        return single or f"{type(module).__name__.lower()} with a parameter: its products are inside one module"
    if weight not in names.tensors or nn.parameter.is_lazy(names.tensors[weight]):
        return "its weight is not a parameter, or not initialised yet"
    x = (*node.args, *node.kwargs.values())[0]
    assert isinstance(x, fx.Node)
    bias = f"{path}.bias" if f"{path}.bias" in names.tensors else None
    assert isinstance(module, Convolution)
    return Product(node, x, weight, "out_in", bias, None, unfolded(names.tensors[weight].shape, module.groups))


def sites_from_graph(graph_module: fx.GraphModule, model: nn.Module) -> tuple[list[Site], list[Skipped]]:
    """Read the sites off a normalised graph, in the order of execution.

    Args:
        graph_module: the captured graph; its ``get_attr`` targets are the model's parameter names.
        model: the model itself, for ties and owners.
    """
    names = ParameterNames(model, graph_module.graph)
    products, skipped = products_by_site(graph_module, names)
    writers = residual_writers(graph_module.graph, {p.node for of_site in products.values() for p in of_site})
    uses = _other_uses(graph_module.graph, names, products)
    groups: dict[tuple[object, ...], int] = {}
    sites = []
    for key, of_site in products.items():
        first = of_site[0]
        weight = names.alias(first.weight, key)
        matrices = _matrices(first, names)
        d_out, d_in, stack = matrices.d_out, matrices.d_in, matrices.stack
        read = (*dict.fromkeys(strip_views(p.input) for p in of_site), d_in, key if _unfolds(first.node) else "")
        group = groups.setdefault(read, len(groups))
        others = [k for k in products if k != key and names.same(products[k][0].weight, weight)]
        tied = tuple(dict.fromkeys([*names.ties(weight), *others])) or tuple(uses[names.canonical(weight)])
        bias = names.alias(first.bias, key) if first.bias else None
        residual = any(p.node in writers for p in of_site)
        operation = _operation(first.node)
        roles = (group, tied, residual, len(of_site), operation)
        sites.append(Site(key, weight, bias, first.layout, d_out, d_in, *roles, stack))
    return sites, skipped


def _unfolds(node: fx.Node) -> bool:
    """Whether a product multiplies its input in an order of its own, which no other product shares."""
    return _operation(node) in CONVOLUTIONS


def sites_from_walk(model: nn.Module) -> tuple[list[Site], list[Skipped]]:
    """Find sites by walking the modules, for a model without a graph: order, groups and roles stay unknown."""
    names = ParameterNames(model)
    sites, skipped = [], []
    for path, module, layout, local in _linear_weights(names):
        weight, reason = f"{path}.{local}".lstrip("."), ""
        single = is_unfolded(module)
        if isinstance(single, str):
            reason = single
        elif layout is None:
            reason = "a subclass of nn.Linear with its own forward"
        elif weight not in names.tensors:
            reason = "its weight is not a parameter"
        elif nn.parameter.is_lazy(names.tensors[weight]):
            reason = "its weight is not initialised yet: run the model once"
        if layout is None or reason:
            skipped.append(Skipped(path, type(module).__name__, reason, (weight,) * (weight in names.tensors)))
            continue
        if isinstance(module, Convolution):
            matrices = unfolded(names.tensors[weight].shape, module.groups)
        else:
            rows, columns = names.tensors[weight].shape
            matrices = Matrices(None, *((rows, columns) if layout == "out_in" else (columns, rows)), layout)
        bias = weight.removesuffix("weight") + "bias"
        bias_name = bias if bias in names.tensors else None
        sizes, ties = (matrices.d_out, matrices.d_in), names.ties(weight)
        sites.append(Site(names.key(weight, path), weight, bias_name, layout, *sizes, tied=ties, stack=matrices.stack))
    return sites, skipped


def _linear_weights(names: ParameterNames) -> Iterator[tuple[str, nn.Module, str | None, str]]:
    for path, module in names.modules.items():
        if names.first_path[id(module)] != path:
            continue
        layout = linear_layout(module)
        if isinstance(module, nn.MultiheadAttention):
            separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            for local in ("in_proj_weight",) if module.in_proj_weight is not None else separate:
                yield path, module, "out_in", local
        elif layout is not None or isinstance(module, nn.Linear):
            yield path, module, layout, "weight"
        elif isinstance(module, Convolution):
            yield path, module, "out_in", "weight"


RECURRENT = (nn.RNNBase, nn.RNNCellBase)
OPAQUE = (Convolution, *RECURRENT, nn.Bilinear)


def _module_path(node: fx.Node) -> str | None:
    if "called_module" in node.meta:
        return str(node.meta["called_module"])
    stack = node.meta.get("nn_module_stack")
    if stack:
        return str(next(reversed(stack.values()))[0])
    return str(node.target) if node.op == "call_module" else None


def _operation(node: fx.Node) -> str:
    if node.op == "call_module" and node.graph.owning_module is not None:
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__.lower()
    if node.op != "call_function":
        return str(node.op)
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def _other_uses(graph: fx.Graph, names: ParameterNames, products: dict[str, list[Product]]) -> dict[str, list[str]]:
    """Uses of a weight that are no product of it, such as an embedding look-up, by the weight's first name."""
    counted = {p.node for of_site in products.values() for p in of_site}
    uses: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module" and node.target in names.modules and node not in counted:
            called = names.modules[node.target]
            for local, _ in called.named_parameters(remove_duplicate=False):
                name = f"{node.target}.{local}"
                uses[names.canonical(name)].append(f"{node.target} ({type(called).__name__.lower()})")
        read = tensor_name(node)
        if read not in names.tensors:
            continue
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if user in counted:
                continue
            if user.target in (aten.t.default, aten.transpose.int, aten.permute.default, aten.to.dtype):
                pending.extend(user.users)
            elif _operation(user) == "embedding" or user.op == "call_module":
                uses[names.canonical(read)].append(f"{_module_path(user) or user.name} ({_operation(user)})")
    return uses
