"""Modules whose forward leaves traces of every kind, each of which the output then depends on or the state shows."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import spectral_norm

SIZE = 6
Trace = Callable[[Any, torch.Tensor], torch.Tensor]


class Slots:
    """Holds a number where there is no ``__dict__``."""

    __slots__ = ("count", "later")

    def __init__(self) -> None:
        self.count = 0


@dataclass(frozen=True)
class Frozen:
    """Whose list may change all the same."""

    seen: list[float] = field(default_factory=list)
    count: int = 0


class Helper:
    """An object beside the module: it counts in a method that is a hook, and holds modules in a list."""

    def __init__(self) -> None:
        self.count, self.layers, self.nested = 0, [nn.Linear(SIZE, SIZE)], {"a": [OrderedDict(x=1, y=2)]}

    def hook(self, module: nn.Module, args: Any) -> Any:
        self.count += 1
        return (args[0] + self.count,)


class Own(dict[str, Any]):
    """A dict that does more when it is written to."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, (value, len(self)))


class Traces(nn.Module):
    """Two linear layers, and a forward that writes wherever it is told to.

    Args:
        names: of the traces, in the order in which they are left.
        fails: raise an error after all have been left.
    """

    def __init__(self, names: Iterable[str], *, fails: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.inner = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.swapped = nn.Linear(SIZE, SIZE)
        self.norm, self.spectral = nn.BatchNorm1d(SIZE), spectral_norm(nn.Linear(SIZE, SIZE))
        self.embedding = nn.Embedding(4, SIZE, max_norm=0.5)
        self.table: Any = {"b": 1, "a": [2]}
        self.ordered: Any = OrderedDict(x=1, y=2, z=3)
        self.own = Own(x=1)
        self.factory: Any = defaultdict(list)
        self.listed: list[Any] = [[1], torch.ones(SIZE)]
        self.queue: Any = deque([1, 2, 3], maxlen=3)
        self.members = {1, 2}
        self.helper, self.slots, self.frozen = Helper(), Slots(), Frozen()
        self.partial = functools.partial(dict, seen=[1])
        self.itself, self.count = [self], 0
        self.plain, self.numbers, self.own_numbers = torch.zeros(SIZE), torch.Generator(), random.Random(3)
        self.plain.note = [1]  # type: ignore[attr-defined]
        for name, value in (("seen", torch.zeros(SIZE)), ("large", torch.zeros(600, 500)), ("passed", torch.ones(3))):
            self.register_buffer(name, value)
        self.first.register_forward_hook(counting())
        self.names, self.fails = tuple(names), fails
        if "lazy_layer" in self.names:
            self.lazy = nn.LazyLinear(SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, 6) to (rows, 6)."""
        x = self.second(self.first(x))
        for name in self.names:
            x = x + TRACES[name](self, x)
        if self.fails:
            raise RuntimeError("after all traces")
        return x


def counting() -> Callable[..., Any]:
    """A hook that counts in its closure."""
    count, seen = 0, []

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal count
        if not getattr(module, "counted", False):
            return None
        count += 1
        seen.append(count)
        return output + len(seen)

    return hook


def traced(function: Callable[[Any, torch.Tensor], object]) -> Trace:
    """Let a trace be added to the output, where it is a number or a tensor."""

    @functools.wraps(function)
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        found = function(m, x)
        return torch.zeros(()) + found if isinstance(found, (int, float, torch.Tensor)) else torch.zeros(())

    TRACES[function.__name__] = run
    return run


TRACES: dict[str, Trace] = {}


@traced
def attribute(m, x):
    m.count += 1
    return m.count


@traced
def new_attribute(m, x):
    m.last = x.detach() + getattr(m, "last", 0)
    return m.last


@traced
def attribute_taken_away(m, x):
    gone = vars(m).pop("slots", None) is None
    return int(gone)


@traced
def entry_of_a_dict(m, x):
    m.table[f"new {len(m.table)}"] = 1
    m.table.pop("b", None)
    return len(m.table)


@traced
def order_of_a_table(m, x):
    m.ordered.move_to_end("x", last=next(iter(m.ordered)) == "x")
    m._modules["first"] = m._modules.pop("first")
    return list(m.ordered).index("x")


@traced
def dict_of_its_own(m, x):
    m.own["y"] = 2
    return len(m.own) + m.own["y"][1]


@traced
def default_of_a_dict(m, x):
    m.factory["rows"].append(len(x))
    return len(m.factory["rows"])


@traced
def nested_list(m, x):
    m.listed[0].append(1)
    m.listed.append(0)
    m.helper.nested["a"][0]["x"] += 1
    return len(m.listed[0]) + m.helper.nested["a"][0]["x"]


@traced
def queue(m, x):
    m.queue.append(sum(m.queue))
    return m.queue[0]


@traced
def member_of_a_set(m, x):
    m.members.add(len(m.members) + 5)
    return len(m.members)


@traced
def slots_of_an_object(m, x):
    if "slots" in vars(m):
        m.slots.count += 1
        m.slots.later = x.detach()
        return m.slots.count


@traced
def frozen_object(m, x):
    m.frozen.seen.append(1.0)
    object.__setattr__(m.frozen, "count", m.frozen.count + 1)
    return len(m.frozen.seen) + m.frozen.count


@traced
def keywords_of_a_partial(m, x):
    m.partial.keywords["seen"].append(1)
    m.partial.keywords.setdefault("more", 1)
    return len(m.partial()["seen"]) + len(m.partial())


@traced
def attribute_of_a_tensor(m, x):
    m.plain.note.append(1)
    return len(m.plain.note)


@traced
def hook_on_the_first_call(m, x):
    if not hasattr(m, "hooked"):
        m.hooked = True
        m.second.register_forward_hook(lambda module, args, output: output * 2)
        m.second._forward_hooks.move_to_end(next(iter(m.second._forward_hooks)))


@traced
def hook_that_goes_away(m, x):
    if not hasattr(m, "helped"):
        m.helped = m.second.register_forward_pre_hook(m.helper.hook)
    elif m.helper.count > 1:
        m.helped.remove()


@traced
def closure_of_a_hook(m, x):
    m.first.counted = True


@traced
def method_of_a_hook(m, x):
    if not m.inner._forward_pre_hooks:
        m.inner.register_forward_pre_hook(m.helper.hook)
    return m.inner(x)


@traced
def hook_of_a_tensor(m, x):
    if not m.first.weight.requires_grad or m.first.weight._backward_hooks:
        return None
    m.first.weight.register_hook(lambda grad: grad * 2)


@traced
def layer_on_the_first_call(m, x):
    if not hasattr(m, "built"):
        m.built = nn.Linear(SIZE, SIZE)
        nn.init.eye_(m.built.weight)
    return m.built(x) + 1


@traced
def lazy_layer(m, x):
    return m.lazy(x)


@traced
def layer_replaced(m, x):
    if isinstance(m.swapped, nn.Linear):
        m.swapped = nn.Sequential(m.swapped, nn.ReLU())
    return m.swapped(x)


@traced
def layer_of_a_helper(m, x):
    m.helper.layers.append(nn.Linear(SIZE, SIZE, bias=False))
    nn.init.eye_(m.helper.layers[-1].weight)
    return m.helper.layers[-1](x) * len(m.helper.layers)


@traced
def class_of_a_layer(m, x):
    m.norm.__class__ = nn.BatchNorm2d if type(m.norm) is nn.BatchNorm1d else nn.BatchNorm1d
    return int(type(m.norm) is nn.BatchNorm2d)


@traced
def modes(m, x):
    m.inner.train(not m.inner.training)
    m.second.eval()


@traced
def statistics_of_a_batch(m, x):
    return nn.functional.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True)


@traced
def spectral_vector(m, x):
    was = m.spectral.training
    m.spectral.train()
    y = m.spectral(x)
    m.spectral.training = was
    return y


@traced
def buffer_in_place(m, x):
    m.seen.add_(x.mean(0))
    return m.seen.detach().clone()


@traced
def large_buffer_in_place(m, x):
    m.large[:, :SIZE] += 1
    return m.large[0, :SIZE].clone()


@traced
def buffer_by_numpy(m, x):
    m.passed.numpy()[0] += 1
    return m.passed[0].clone()


@traced
def buffers_of_a_table(m, x):
    m.register_buffer("cache", x.detach().sum(0), persistent=False)
    m.seen = m.seen.detach() + 1
    return m.seen


@traced
def tensor_in_a_list(m, x):
    m.listed[1].mul_(2)
    m.plain += 1
    return m.listed[1] + m.plain


@traced
def parameter_in_place(m, x):
    with torch.no_grad():
        m.inner.weight.mul_(1.5)
        torch._foreach_add_([m.inner.bias], 1)
    return m.inner.weight.detach().sum()


@traced
def data_of_a_parameter(m, x):
    m.inner.weight.data.add_(1)
    m.inner.bias.data = m.inner.bias.data * 2 + 1
    return m.inner.bias.detach().sum()


@traced
def view_of_a_parameter(m, x):
    m.second.weight.detach()[:2].fill_(0.1)
    torch.add(m.inner.bias.detach(), 1, out=m.inner.bias.detach())


@traced
def parameter_replaced(m, x):
    m.inner.weight = nn.Parameter(m.inner.weight.detach() + 1)
    return m.inner.weight.detach().mean()


@traced
def rows_of_an_embedding(m, x):
    return m.embedding(torch.tensor([0, 1])).sum(0)


@traced
def flags_and_gradients(m, x):
    m.inner.bias.requires_grad_(not m.inner.bias.requires_grad)
    m.inner.weight.grad = torch.ones(SIZE, SIZE) if m.inner.weight.grad is None else m.inner.weight.grad + 1


@traced
def size_of_a_tensor(m, x):
    if m.large.shape[0] > 1:
        m.plain.resize_(SIZE + 2).fill_(1)
        m.plain.resize_(SIZE)


@traced
def random_numbers(m, x):
    return random.random() + np.random.rand() + torch.rand(())


@traced
def own_random_numbers(m, x):
    return m.own_numbers.random() + torch.rand((), generator=m.numbers)
