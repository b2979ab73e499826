"""Mixins that other packages add to the classes of roots, as ``save_pretrained`` of a ``transformers`` model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from surgery.hosting.subclasses import Pickles, has_mixin, put_on, take_off


class RootMixin(Pickles):
    """Base of such a mixin, which is known as soon as it is defined."""

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether a root is to have it."""
        raise NotImplementedError


Mixin = TypeVar("Mixin", bound=type[RootMixin])
MIXINS: list[type[RootMixin]] = []


def root_mixin(mixin: Mixin) -> Mixin:
    """Have a mixin put on each root that it suits."""
    MIXINS.append(mixin)
    return mixin


def put_mixins_on(model: nn.Module) -> None:
    """Put on a root what suits it."""
    for mixin in MIXINS:
        if mixin.suits(model):
            put_on(model, mixin)


def take_mixins_off(model: nn.Module) -> None:
    """Take all of them off."""
    for mixin in MIXINS:
        if has_mixin(model, mixin):
            take_off(model, mixin)
