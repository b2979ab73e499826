"""Cached subclasses: change what an object does without hiding what it is.

A module's class becomes a subclass of its own class, as FSDP2 does: ``isinstance`` holds, hooks, references and
parameters stay, and undoing it is changing the class back. The subclass keeps the name of its base, is found again
through ``cls.__subclasses__()`` (no cache keeps a class alive), and pickles by its base.
"""

from __future__ import annotations

import types
from typing import SupportsIndex

from torch import nn

MIXIN = "_sspace_mixin"


def subclass_of(cls: type, mixin: type) -> type:
    """The subclass of a class with a mixin in front, made on first use.

    Raises:
        TypeError: the class cannot be subclassed.
    """
    other: type
    for other in cls.__subclasses__():
        if vars(other).get(MIXIN) is mixin:
            return other
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, MIXIN: mixin}
    return types.new_class(cls.__name__, (mixin, cls), {}, lambda body: body.update(names))


def has_mixin(obj: object, mixin: type) -> bool:
    """Whether an object's class has a mixin."""
    return mixin in type(obj).__mro__


def change_class(module: nn.Module, cls: type) -> None:
    """Give a module another class, also where it forbids to set attributes."""
    object.__setattr__(module, "__class__", cls)


def put_on(module: nn.Module, mixin: type) -> None:
    """Make a module's class a subclass with a mixin."""
    change_class(module, subclass_of(type(module), mixin))


def take_off(module: nn.Module, mixin: type) -> None:
    """Take a mixin off a module's class, also from under classes that others have put on since."""
    change_class(module, without(type(module), mixin))


def without(cls: type, mixin: type) -> type:
    """The class that a class would be, had its bases not been given a mixin."""
    if mixin not in cls.__mro__:
        return cls
    if vars(cls).get(MIXIN) is mixin:
        return cls.__bases__[1]  # type: ignore[no-any-return]
    bases = tuple(without(base, mixin) for base in cls.__bases__)
    other: type
    for other in bases[-1].__subclasses__():  # FSDP2 and parametrizations may have made it before
        if other.__bases__ == bases and other.__name__ == cls.__name__ and vars(other).keys() == vars(cls).keys():
            return other
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, {}, lambda body: body.update(members))


class Pickles:
    """Base of mixins: pickles and copies by the class without any of them."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Nothing: a class of the user's is not told of ours, and may want arguments that nobody can give."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        made = super().__reduce_ex__(protocol)
        if MIXIN not in vars(type(self)) or not isinstance(made, tuple):  # a subclass that others have made of ours
            return made
        return (bare_instance, class_and_mixins(type(self)), *made[2:])


def class_and_mixins(cls: type) -> tuple[type, tuple[type, ...]]:
    """A class without our mixins, and these, in the order that they were put on."""
    mixins = [vars(c)[MIXIN] for c in cls.__mro__ if MIXIN in vars(c)]
    for mixin in mixins:
        cls = without(cls, mixin)
    return cls, tuple(reversed(mixins))


def bare_instance(cls: type, mixins: tuple[type, ...]) -> object:
    """An instance of a class with mixins, without its state."""
    for mixin in mixins:
        cls = subclass_of(cls, mixin)
    return cls.__new__(cls)  # type: ignore[call-overload]
