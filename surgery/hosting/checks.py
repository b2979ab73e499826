"""What is refused before a model is touched: wrong options, weights that are not there or cannot be factorised."""

from __future__ import annotations

import torch
from torch import nn

from passes.analysis.linear_sites import Site
from passes.errors import InputError
from surgery.errors import VariantError, WeightError
from surgery.lowerings import ALWAYS, IN_RESIDUAL, REGISTRY
from surgery.modules.base_weights import BaseWeight, base_weight_in
from surgery.modules.core import Factors
from surgery.modules.site_module import SiteModule
from surgery.variants import Variant


def check_weight(model: nn.Module, site: Site) -> None:
    """Refuse a weight that cannot be factorised.

    Raises:
        WeightError: it is on the meta device, quantised, sharded, a tensor subclass, or not finite.
    """
    if reason := base_weight_in(model, site).why_not():
        raise WeightError(f"site {site.key!r}: {reason}")


def check_whole(key: str, base: BaseWeight) -> None:
    """Refuse a weight of which this process holds a shard.

    Raises:
        WeightError: it is sharded.
    """
    if reason := base.why_not_whole():
        raise WeightError(f"site {key!r}: {reason}")


def check_there(key: str, site: SiteModule) -> None:
    """Refuse a site whose values are gone, or not loaded yet, where they are to be read.

    Raises:
        WeightError: its weight, its factors or its core are on the meta device.
    """
    held = [*site.core.tensors().values(), site.factors.U]
    if any(tensor.is_meta for tensor in held) or (site.host.keeps_base and site.host.parameter().is_meta):
        raise WeightError(
            f"site {key!r} is on the meta device, where there are no values to read; move the model to a device with "
            "to_empty and load its weights and adapter first"
        )


def check_factors(site: Site, factors: Factors) -> None:
    """Refuse factors that do not fit their dtype.

    Raises:
        WeightError: one of them is not finite.
    """
    for name in ("U", "S", "Vh"):
        factor = getattr(factors, name)
        if not torch.isfinite(factor).all():
            raise WeightError(
                f"site {site.key!r}: its factor {name} overflows {str(factor.dtype).removeprefix('torch.')}; "
                "set factors_dtype='float32' on the variant"
            )


def check_options(
    config: Variant, calibration: object, form: str, lowering: str, keep_base: bool, seed: int, is_graph: bool
) -> tuple[str, str]:
    """Refuse options of ``apply_surgery`` that are wrong, or do not go together.

    Returns:
        Form and lowering, each of which may be named by the other.

    Raises:
        InputError: says which, and what there is.
        VariantError: the variant needs data.
    """
    check_seed(seed)
    check_flags(keep_base=keep_base)
    if calibration is None and config.needs_calibration:
        wanted = "Contrast(positive, negative)" if config.statistic == "contrast" else "an iterable of batches"
        raise VariantError(f"{config.name} needs data to choose its factors by: pass calibration={wanted}")
    check_form(form)
    known = ("auto", ALWAYS, IN_RESIDUAL) if is_graph else ("auto", "measure", *REGISTRY)
    if not isinstance(lowering, str) or lowering not in known:
        where = "in a graph " if is_graph else ""
        raise InputError(f"lowering {where}must be one of {', '.join(known)}; found {lowering!r:.80}")
    if form == "residual" and lowering not in ("auto", IN_RESIDUAL):
        raise InputError(f"form='residual' has one lowering: leave lowering out; found {lowering!r:.80}")
    form = "residual" if lowering == IN_RESIDUAL else form
    if not keep_base and (form != "residual" or is_graph):
        where = "the graph: use to_graph(model, inputs, form='residual', keep_base=False)" if is_graph else "the model"
        raise InputError(f"keep_base=False needs form='residual'; in delta form the base weight is part of {where}")
    return form, IN_RESIDUAL if form == "residual" and not is_graph else lowering


def check_form(form: object) -> None:
    """Refuse what is no form of a site.

    Raises:
        InputError: says which there are.
    """
    if not isinstance(form, str) or form not in ("delta", "residual"):
        raise InputError(f"form must be 'delta' or 'residual', found {form!r:.80}")


def check_seed(seed: object) -> None:
    """Refuse what is no seed.

    Raises:
        InputError: it is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, found {seed!r:.80}")


def check_flags(**flags: object) -> None:
    """Refuse values that are neither True nor False, by the names of the arguments.

    Raises:
        InputError: names the first one.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, found {value!r:.80}")


def check_loaded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise WeightError(f"parameter {name!r} is not initialised yet; run the model once before surgery")
        if parameter.is_meta:
            raise WeightError(f"parameter {name!r} is on the meta device; load the weights before surgery")
