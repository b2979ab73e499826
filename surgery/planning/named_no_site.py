"""Say why a name that was asked for is no site: its product is none that can be adapted, or it is no product at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from passes.analysis.linear_sites import Skipped
from passes.capture.inspect_model import Inspection


def why_no_site(model: nn.Module, inspection: Inspection, asked: Callable[[str], bool]) -> str | None:
    """The reason of the first part of a model that is asked for and is no site; None where no such part is there.

    Args:
        asked: whether a pattern matches a name.
    """
    return next(_reasons(model, inspection, asked), None)


def left_alone(inspection: Inspection, asked: Callable[[str], bool]) -> Skipped | None:
    """The first product with a parameter that is asked for and was left alone, or None."""
    return next((skip for skip in inspection.skipped if skip.weights and any(map(asked, _names(skip)))), None)


def _reasons(model: nn.Module, inspection: Inspection, asked: Callable[[str], bool]) -> Iterator[str]:
    for skip in inspection.skipped:
        if any(map(asked, _names(skip))):
            yield f"{skip.where!r} is no site: {skip.reason}"
    for path, module in model.named_modules():
        if path and asked(path):
            inside = [site.key for site in inspection.sites if site.key.startswith(f"{path}.")]
            more = f", but contains {', '.join(inside[:3])}{', ...' * (len(inside) > 3)}" if inside else ""
            yield f"{path!r} is no site: it is a module of class {type(module).__name__} and no product itself{more}"
    for name, parameter in model.named_parameters():
        if asked(name):
            sizes = "x".join(map(str, parameter.shape)) or "one number"
            yield f"{name!r} is no site: this parameter ({sizes}) was found in no product"


def _names(skip: Skipped) -> list[str]:
    """The names that a user may give a product: where it stands, its parameters, their modules."""
    return [skip.where, *skip.weights, *(weight.removesuffix(".weight") for weight in skip.weights)]
