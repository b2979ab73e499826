"""Random programs through every verb on graphs: identity, the right function, gradients, fold, merge, undo.

Each program is run by an interpreter of its own in float64, which adds each site's change where its weight is used.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import surgery
from passes.infra.dialect import check_graph
from passes.ir.provenance import adapter_instances
from surgery import (
    apply_surgery,
    fold,
    inspect_sites,
    load_adapter,
    merge,
    save_adapter,
    set_coeff,
    sites,
    to_graph,
    undo_surgery,
)
from tests.support.graph_listing import listing, tensors
from tests.support.graph_values import value_at
from tests.support.tolerance import assert_close

PRODUCTS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear_t": lambda x, w, b: F.linear(x, w.t(), b),
    "linear_transpose": lambda x, w, b: F.linear(x, w.transpose(0, 1), bias=b),
    "at": lambda x, w, b: x @ w if b is None else x @ w + b,
    "matmul": lambda x, w, b: x.matmul(w) if b is None else torch.matmul(x, w) + b,
    "at_t": lambda x, w, b: x @ w.t() if b is None else b + x @ w.t(),
    "at_T": lambda x, w, b: x @ w.T if b is None else x @ w.T + b,
    "at_permute": lambda x, w, b: x @ w.permute(1, 0) if b is None else x @ w.permute(1, 0) + b,
    "mm": lambda x, w, b: torch.mm(x, w) if b is None else torch.addmm(b, x, w),
    "mm_t": lambda x, w, b: x.mm(w.t()) if b is None else torch.addmm(b, x, w.transpose(-2, -1)),
}
OUT_IN = ("linear", "at_t", "at_T", "at_permute", "mm_t")  # x W^T; the others are x W
PLAIN = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": lambda x: x.sigmoid(),
    "scale": lambda x: x * 1.5,
    "relu_": lambda x: x.relu_(),
    "F.relu_": lambda x: F.relu(x, inplace=True),
    "leading": lambda x: x.flatten(0, 1),
    "reshape": lambda x: x.reshape(-1, x.shape[-1]),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "swap": lambda x: x.transpose(0, 1),
    "last": lambda x: x.transpose(-1, -2),
    "halves": lambda x: x.unflatten(-1, (2, -1)),
    "view": lambda x: x.contiguous().view(x.size(0), -1),
}


@dataclass
class Step:
    """One line of a program: an operation on earlier values, with the names of what it uses."""

    kind: str
    sources: tuple[int, ...]
    name: str = ""
    bias: str | None = None
    to: torch.dtype | None = None


class Program(nn.Module):
    """A straight line of steps, each of which makes one value; returns the values that ``outputs`` lists."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.outputs: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(self.step(step, [values[i] for i in step.sources]))
        found = tuple(values[i] for i in self.outputs)
        return found[0] if len(found) == 1 else found

    def step(self, step: Step, given: list[Any]) -> Any:
        if step.kind == "module":
            return self.get_submodule(step.name)(given[0])
        if step.kind in PRODUCTS:
            bias = getattr(self, step.bias) if step.bias else None
            return PRODUCTS[step.kind](given[0], getattr(self, step.name), bias)
        if step.kind == "cast":
            return given[0].to(step.to)
        if step.kind == "add":
            return given[0] + given[1]
        if step.kind == "cat":
            return torch.cat(given, dim=-1)
        return PLAIN[step.kind](given[0])

    def in_float64(self, x: torch.Tensor, changes: dict[str, torch.Tensor], *, by_path: bool = False) -> Any:
        """What the program gives in float64, ``changes`` (d_out, d_in) added to the weight of each site.

        Args:
            by_path: a module with two paths is two sites, as an exported graph has it.
        """
        wide = copy.deepcopy(self).double().requires_grad_(False)
        first: dict[int, str] = {}
        for path, module in wide.named_modules(remove_duplicate=False):
            first.setdefault(id(module), path)

        def called(path: str, x: torch.Tensor) -> torch.Tensor:
            module = wide.get_submodule(path)
            if isinstance(module, nn.Sequential):
                for name in module._modules:
                    x = called(f"{path}.{name}", x)
                return x
            y: torch.Tensor = module(x)
            key = path if by_path else first[id(module)]
            return y + F.linear(x, changes[key]) if key in changes else y

        values = [x.double()]
        for step in self.steps:
            sources = [values[i] for i in step.sources]
            if step.kind == "module":
                values.append(called(step.name, sources[0]))
            elif step.kind in PRODUCTS and step.name in changes:
                values.append(wide.step(step, sources) + F.linear(sources[0], changes[step.name]))
            elif step.kind == "cast":
                values.append(sources[0].clone())  # a cast to another dtype is a copy, which later writes pass by
            else:
                values.append(wide.step(step, sources))
        return tuple(values[i] for i in self.outputs)


@dataclass
class Made:
    """A program, an input, and what the checks should know of it."""

    program: Program
    x: torch.Tensor
    in_place: bool = False  # writes to a value that something else has read: no gradients
    rows: bool = True  # the batch stays in front

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        steps = "\n".join(f"  {i}: {step}" for i, step in enumerate(self.program.steps, 1))
        shape, dtype, outputs = tuple(self.x.shape), self.x.dtype, self.program.outputs
        printer.text(f"{self.program}\n{shape} {dtype}\n{steps}\n -> {outputs}")


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])
STEPS = (
    "module", "module", "nested", "again", "tied", "raw", "raw", "raw_again", "plain", "plain", "plain", "view", "view",
    "add", "cat", "dead", "cast", "stacked",
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> Made:
    """Programs of up to eight steps on inputs of one to four dimensions."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    batch = draw(st.sampled_from([1, 2, 3, 5]))
    shape = (batch, *(draw(st.lists(SIZES, min_size=0, max_size=2)) if draw(st.booleans()) else []), draw(SIZES))
    shape = shape[-1:] if draw(st.integers(0, 9)) == 0 else shape
    made = Made(Program(), torch.randn(shape, dtype=dtype), rows=len(shape) > 1)
    program, shapes, dtypes, read = made.program, [shape], [dtype], set()
    products: list[int] = []

    def push(kind: str, sources: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, **more: Any) -> int:
        read.update(sources)
        program.steps.append(Step(kind, sources, **more))
        shapes.append(shape)
        dtypes.append(dtype)
        return len(shapes) - 1

    def linear(i: int, out: int) -> nn.Linear:
        return nn.Linear(shapes[i][-1], out, bias=draw(st.booleans()), dtype=dtypes[i])

    def call(module: nn.Module, i: int, out: int, prefix: str = "m") -> int:
        name = f"{prefix}{len(program._modules)}"
        setattr(program, name, module)
        products.append(push("module", (i,), (*shapes[i][:-1], out), dtypes[i], name=name))
        return products[-1]

    def raw(i: int) -> int:
        flat = len(shapes[i]) == 2
        kind = draw(st.sampled_from([k for k in PRODUCTS if flat or not k.startswith("mm")]))
        d_in, d_out = shapes[i][-1], draw(SIZES)
        name = f"w{len(program._parameters)}"
        size = (d_out, d_in) if kind in OUT_IN else (d_in, d_out)
        setattr(program, name, nn.Parameter(torch.randn(size, dtype=dtypes[i]) / d_in**0.5))
        bias = None
        if draw(st.booleans()):
            bias = f"b{len(program._parameters)}"
            setattr(program, bias, nn.Parameter(torch.randn(d_out, dtype=dtypes[i])))
        products.append(push(kind, (i,), (*shapes[i][:-1], d_out), dtypes[i], name=name, bias=bias))
        return products[-1]

    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8)):
        i = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        shape, dtype = shapes[i], dtypes[i]
        width = shape[-1]
        if step in ("module", "dead"):
            j = call(linear(i, out := draw(SIZES)), i, out, "dead" if step == "dead" else "m")
            if step == "dead":
                read.add(j)
        elif step == "nested":
            inner = nn.Sequential(linear(i, hidden := draw(SIZES)), nn.Tanh())
            last = nn.Linear(hidden, width, dtype=dtype)
            if hidden == width and draw(st.booleans()):
                last = inner[0]  # one module, twice
            call(nn.Sequential(inner, last, nn.ReLU()), i, width)
        elif step == "stacked":
            call(nn.Linear(hidden := draw(SIZES), width, dtype=dtype), call(linear(i, hidden), i, hidden), width)
        elif step == "again":
            fits = [
                s for s in program.steps
                if s.kind == "module" and shapes[s.sources[0]][-1] == width and dtypes[s.sources[0]] == dtype
            ]  # fmt: skip
            if fits:
                s = draw(st.sampled_from(fits))
                out = shapes[program.steps.index(s) + 1][-1]
                products.append(push("module", (i,), (*shape[:-1], out), dtype, name=s.name))
        elif step == "tied":
            fits = [m for m in program.modules() if isinstance(m, nn.Linear)]
            fits = [m for m in fits if m.in_features == width and m.weight.dtype == dtype]
            if fits:
                other = draw(st.sampled_from(fits))
                module = linear(i, other.out_features)
                module.weight = other.weight
                call(module, i, other.out_features)
        elif step == "raw":
            raw(i)
        elif step == "raw_again":
            fits = [
                s for s in program.steps
                if s.kind in PRODUCTS and shapes[s.sources[0]][-1] == width and dtypes[s.sources[0]] == dtype
                and (len(shape) == 2 or not s.kind.startswith("mm"))
            ]  # fmt: skip
            if fits:
                s = draw(st.sampled_from(fits))
                out = shapes[program.steps.index(s) + 1][-1]
                bias = s.bias if draw(st.booleans()) else None
                products.append(push(s.kind, (i,), (*shape[:-1], out), dtype, name=s.name, bias=bias))
        elif step == "plain":
            kinds = ["tanh", "relu", "gelu", "sigmoid", "scale"]
            kinds += ["relu_", "F.relu_"] if i in products else []
            kind = draw(st.sampled_from(kinds))
            last = i > 0 and isinstance(getattr(program, program.steps[i - 1].name or "_", None), nn.Sequential)
            made.in_place |= kind.endswith("relu_") and (i in read or last)  # or what a ReLU has given
            if kind.endswith("relu_") and draw(st.booleans()):
                made.in_place = True  # what reads the value from now on reads what was written to it
                push(kind, (i,), shape, dtype)
                read.discard(i)
            else:
                push(kind, (i,), shape, dtype)
        elif step == "view":
            options = {"last": (*shape[:-2], *shape[:-3:-1])} if len(shape) > 1 else {}
            if 1 < len(shape) < 4:
                options["unsqueeze"] = (shape[0], 1, *shape[1:])
                options["swap"] = (shape[1], shape[0], *shape[2:])
            if len(shape) == 3:
                options["leading"] = (shape[0] * shape[1], shape[2])
                options["view"] = (shape[0], shape[1] * shape[2])
            if len(shape) > 2:
                options["reshape"] = (int(torch.tensor(shape[:-1]).prod()), width)
            if width % 2 == 0 and len(shape) < 4:
                options["halves"] = (*shape[:-1], 2, width // 2)
            if options:
                kind = draw(st.sampled_from(sorted(options)))
                made.rows &= kind != "swap" and (kind != "last" or len(shape) > 2)
                push(kind, (i,), options[kind], dtype)
        elif step in ("add", "cat"):
            last = step == "add"
            fits = [j for j in range(len(shapes)) if shapes[j][:-1] == shape[:-1] and dtypes[j] == dtype]
            fits = [j for j in fits if not last or shapes[j] == shape]
            j = draw(st.sampled_from(fits))
            push(step, (i, j), shape if last else (*shape[:-1], width + shapes[j][-1]), dtype)
        elif step == "cast":
            other = torch.float64 if dtype == torch.float32 else torch.float32
            push("cast", (i,), shape, other, to=other)
    if not products:
        raw(len(shapes) - 1)
    program.outputs = tuple(i for i in range(1, len(shapes)) if i not in read)
    if not program.outputs:
        program.outputs = (push("scale", (len(shapes) - 1,), shapes[-1], dtypes[-1]),)
    for parameter in program.parameters():
        parameter.requires_grad_(draw(st.integers(0, 3)) > 0)
    program.train(draw(st.booleans()))
    return made


def captured(made: Made, dialect: str) -> fx.GraphModule:
    if dialect == "fx":
        return fx.symbolic_trace(made.program)
    free = (dict.fromkeys(range(made.x.dim()), torch.export.Dim.AUTO),) if dialect == "dynamic" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(made.program, (made.x,), dynamic_shapes=free, strict=False).module()


def run(model: nn.Module, x: torch.Tensor, *, grad: bool = False) -> tuple[torch.Tensor, ...]:
    with torch.set_grad_enabled(grad):
        found = model(x.clone())
    return found if isinstance(found, tuple) else (found,)


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def flat(values: Any) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in values])


def close(found: Any, expected: Any, made: Made) -> None:
    """All outputs as one tensor; a few numbers that may cancel are compared where they are given in float64."""
    found, expected = list(found), list(expected)
    assert [tuple(a.shape) for a in found] == [tuple(b.shape) for b in expected]
    narrow = any(t.dtype == torch.float32 for t in (*found, made.x, *made.program.parameters()))
    narrow |= any(step.to == torch.float32 for step in made.program.steps)
    if narrow and sum(t.numel() for t in found) < 8:
        return
    assert_close(flat(found), flat(expected), torch.float32 if narrow else torch.float64)


def randomise(model: nn.Module) -> None:
    for site in sites(model).values():
        site.core.g.data.copy_(torch.randn_like(site.core.g) / 2)


def changes(model: nn.Module, coeff: float, gains: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    found = {}
    for key, site in sites(model).items():
        U, S, Vh = (factor.double() for factor in (site.factors.U, site.factors.S, site.factors.Vh))
        g = gains[key] if gains else site.core.g.detach().double()
        found[key] = U * (S * F.elu(coeff * g)) @ Vh
    return found


def expected(made: Made, model: nn.Module, coeff: float, **options: Any) -> Any:
    return made.program.in_float64(made.x, changes(model, coeff), **options)


def sound(graph: fx.GraphModule) -> fx.GraphModule:
    assert check_graph(graph) == []
    graph.graph.lint()
    return graph


def check_gradients(made: Made, model: nn.Module, coeff: float, **options: Any) -> None:
    """The gradient of each core, weighted sums of all outputs, against the float64 interpreter's."""
    gains = {key: site.core.g.detach().double().requires_grad_() for key, site in sites(model).items()}
    torch.manual_seed(0)
    wide = made.program.in_float64(made.x, changes(model, coeff, gains), **options)
    weights = [torch.randn_like(value) for value in wide]
    goal = sum((w * v).sum() for w, v in zip(weights, wide, strict=True))
    outputs = run(model, made.x, grad=True)
    loss = sum((w * v.double()).sum() for w, v in zip(weights, outputs, strict=True))
    cores = {key: site.core.g for key, site in sites(model).items()}
    assert loss.requires_grad == goal.requires_grad
    if not goal.requires_grad:  # every site is dead
        return
    goal.backward()
    found = torch.autograd.grad(loss, list(cores.values()), allow_unused=True)
    found = [torch.zeros_like(g) if f is None else f for f, g in zip(found, cores.values(), strict=True)]
    wanted = [torch.zeros_like(g) if g.grad is None else g.grad for g in gains.values()]
    close(found, wanted, made)


def choose(data: st.DataObject, keys: list[str]) -> Any:
    some = data.draw(st.lists(st.sampled_from(keys), unique=True, min_size=1))
    return some if len(some) < len(keys) and data.draw(st.booleans()) else keys


def is_moved(graph: fx.GraphModule, name: str, x: torch.Tensor) -> bool:
    """Whether the contents of any row change the value of a node: after ReLU not all of them do."""
    torch.manual_seed(0)
    for row in list(range(len(x))) * 8:
        one = torch.randn_like(x)
        other = one.clone()
        other[row] = torch.randn_like(one[row])
        if not torch.equal(value_at(graph, name, one), value_at(graph, name, other)):
            return True
    return False


def check_rows(made: Made, graph: fx.GraphModule, plain: fx.GraphModule) -> None:
    """Rows together are what they are apart; refused only where no row of the base moves what a site is given."""
    rows = torch.linspace(-1, 1, len(made.x))
    try:
        together = run(set_coeff(graph, rows), made.x)
    except surgery.InputError as error:
        refused = re.match(r"site '([^']+)': its input does not depend on what a row of the batch holds", str(error))
        if refused is None:
            raise
        outs = {instance.out.name: instance.provenance.at for instance in adapter_instances(graph.graph)}
        fed = [instance.provenance.input for instance in adapter_instances(graph.graph, [refused[1]])]
        assert not all(is_moved(plain, outs.get(name, name), made.x) for name in fed)
        return
    apart = [run(set_coeff(graph, float(row)), made.x) for row in rows]
    for values in zip(together, *apart, strict=True):
        share = len(values[0]) // len(rows)
        wanted = [value[i * share : (i + 1) * share] for i, value in enumerate(values[1:])]
        close([values[0]], [torch.cat(wanted)], made)


FULL = settings().max_examples > 100
# each is a whole way through the compiler: in the gate fewer than of others
PROGRAMS = settings() if FULL else settings(max_examples=10)


@pytest.mark.parametrize("dialect", ["fx", "static", "dynamic"])
@PROGRAMS
@given(data=st.data())
def test_verbs_on_a_captured_program(dialect, data):
    made = data.draw(programs())
    original, by = tensors(made.program), {"by_path": dialect != "fx"}
    graph = captured(made, dialect)
    found = inspect_sites(graph)
    if not found.sites:
        event("no site")
        return
    flags = {name: p.requires_grad for name, p in graph.named_parameters()}
    graph.requires_grad_(False)
    base = run(graph, made.x)
    for name, p in graph.named_parameters():
        p.requires_grad_(flags[name])
    nodes, before, plain = listing(graph), tensors(graph), copy.deepcopy(graph)
    free = [site.key for site in found.sites if not site.tied]
    all_linear = bool(free) and data.draw(st.booleans())
    targets = "all-linear" if all_linear else choose(data, [site.key for site in found.sites])
    options = {"r": data.draw(st.integers(1, 6)), "target_modules": targets, "progress": False}
    apply_surgery(graph, "antipasto", **options)
    assert set(sites(graph)) == set(free if all_linear else targets)
    sound(graph)
    assert same(run(graph, made.x), base)
    assert {name for name, p in graph.named_parameters() if p.requires_grad} == {
        name for name, _ in graph.named_parameters() if name.endswith(".core.g")
    }
    randomise(graph)
    coeff = data.draw(st.sampled_from([1.0, -0.5, 2.0]))
    set_coeff(graph, coeff)
    live = run(graph, made.x)
    close(live, expected(made, graph, coeff, **by), made)
    if not made.in_place:
        check_gradients(made, graph, coeff, **by)
    if made.rows and not any(site.host.name == "weight" for site in sites(graph).values()):
        check_rows(made, graph, plain)
        set_coeff(graph, coeff)
    copied = copy.deepcopy(graph)
    assert list(sites(copied)) == list(sites(graph))
    assert same(run(sound(copied), made.x), live)
    randomise(copied)
    assert same(run(graph, made.x), live)
    del copied
    what = data.draw(st.sampled_from(["merge", "dense", "fold", "core", "coeff", "file"]))
    other = copy.deepcopy(graph)
    tied = any(site.tied for site in found.sites)
    if what == "merge":
        merge(other, untie=True)
    elif what == "file":
        with tempfile.TemporaryDirectory() as path:
            save_adapter(graph, path)
            other = load_adapter(plain, path)
        assert same(run(set_coeff(other, coeff), made.x), live)
        other = undo_surgery(other)
        assert listing(other) == nodes
    else:
        fold(
            other,
            freeze_core=what in ("dense", "core"),
            freeze_coeff={"core": False, "coeff": True}.get(what),
            untie=True,
            debug=True,
        )
    sound(other)
    if what in ("merge", "dense"):
        assert sites(other) == {}
        assert tied or [node[:3] for node in listing(other)] == [node[:3] for node in nodes]
        assert {name: p.requires_grad for name, p in other.named_parameters() if name in flags} == flags
    if what != "file":
        close(run(other, made.x), live, made)
    if what == "dense":
        assert same(run(other, made.x), run(merge(copy.deepcopy(graph), untie=True), made.x))
    elif what == "core":
        close(run(set_coeff(other, 0.5), made.x), expected(made, graph, 0.5, **by), made)
    elif what == "coeff":
        with pytest.raises(surgery.InputError, match="folded into a constant"):
            set_coeff(other, 0.5)
    elif what == "fold":
        again = listing(other)
        fold(other)
        assert listing(other) == again
    if what in ("fold", "coeff"):
        randomise(other)
        close(run(other, made.x), expected(made, other, coeff, **by), made)
        if not made.in_place:
            check_gradients(made, other, coeff, **by)
    if what in ("fold", "core", "coeff"):
        undo_surgery(sound(other))
        assert listing(other) == nodes
        assert same(run(other.requires_grad_(False), made.x), base)  # frozen, as the base was: flags choose kernels
    assert same(run(graph, made.x), live)
    set_coeff(graph, 0.0)
    assert same(run(graph, made.x), base)
    undo_surgery(sound(graph))
    assert listing(graph) == nodes
    assert tensors(graph) == before
    assert tensors(made.program) == original or dialect == "fx"
    assert {n: v[2] for n, v in tensors(made.program).items()} == {n: v[2] for n, v in original.items()}


@PROGRAMS
@given(data=st.data())
def test_a_program_operated_in_place_through_the_compiler(data):
    made = data.draw(programs())
    program, x = made.program, made.x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = inspect_sites(program, x)
    if not found.sites:
        event("no site")
        return
    original, plain = tensors(program), copy.deepcopy(program)
    operated = copy.deepcopy(program)
    apply_surgery(
        operated, "antipasto", r=data.draw(st.integers(1, 6)), progress=False, example_inputs=x,
        target_modules=choose(data, [site.key for site in found.sites]),
    )  # fmt: skip
    randomise(operated)
    coeff = data.draw(st.sampled_from([1.0, -0.5, 2.0]))
    wanted = made.program.in_float64(x, changes(set_coeff(operated, coeff), coeff))
    before, live = tensors(operated), run(operated, x)
    close(live, wanted, made)
    form = data.draw(st.sampled_from(["delta", "residual"]))
    keep_base = form == "delta" or data.draw(st.booleans())
    graph = to_graph(operated, x, form=form, keep_base=keep_base, verify=True, debug=True)
    event(form)
    assert list(sites(graph)) == list(sites(operated))
    close(run(sound(graph), x), wanted, made)
    if not made.in_place:
        check_gradients(made, graph, coeff)
    copied = copy.deepcopy(graph)
    assert same(run(copied, x), run(graph, x))
    core = data.draw(st.booleans())
    fold(copied, freeze_core=core, untie=True, verify=x, debug=True)
    close(run(sound(copied), x), wanted, made)
    if not core:
        merge(copied, untie=True, verify=x)
        close(run(sound(copied), x), wanted, made)
    assert sites(copied) == {}
    close(run(sound(merge(copy.deepcopy(graph), untie=True, verify=x)), x), wanted, made)
    if keep_base:
        undo_surgery(graph)
        sound(graph)
        assert len(listing(graph)) == len(listing(copied)) or any(site.tied for site in found.sites)
        close(run(graph, x), plain.in_float64(x, {}), made)
    else:
        with pytest.raises(surgery.SurgeryError, match="was not kept"):
            undo_surgery(graph)
    assert tensors(operated) == before
    assert tensors(program) == original
