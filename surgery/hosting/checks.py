"""What is refused before a model is touched: wrong options, weights that are not there or cannot be factorised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from passes.analysis.linear_sites import Site
from passes.errors import InputError
from surgery.errors import VariantError, WeightError
from surgery.lowerings import REGISTRY
from surgery.modules.core import Factors
from surgery.support.distributed import is_sharded
from surgery.support.fingerprint import DTYPES
from surgery.variants import Variant


def check_weight(model: nn.Module, site: Site) -> None:
    """Refuse a weight that cannot be factorised.

    Raises:
        WeightError: it is on the meta device, quantised, sharded, a tensor subclass, or not finite.
    """
    weight = site.parameter_of(model)
    if weight.numel() == 0:
        raise WeightError(f"site {site.key!r}: its weight of shape {tuple(weight.shape)} has no entries")
    check_plain(site.key, weight)
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(f"site {site.key!r}: {bad} of {weight.numel()} entries of its weight are not finite")


def check_plain(key: str, weight: torch.Tensor) -> None:
    """Refuse a weight whose entries are not there as plain numbers.

    Raises:
        WeightError: it is on the meta device, quantised, sharded or a tensor subclass.
    """
    supported = "supported are plain float16, bfloat16, float32 and float64 parameters"
    if weight.is_meta:
        raise WeightError(f"site {key!r}: its weight is on the meta device; load the weights first ({supported})")
    check_whole(key, weight)
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor or weight.dtype not in DTYPES.values():
        kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
        raise WeightError(f"site {key!r}: its weight is a {kind} of {weight.dtype}, quantised; {supported}")


def check_whole(key: str, weight: torch.Tensor) -> None:
    """Refuse a weight of which this process holds a shard.

    Raises:
        WeightError: it is sharded.
    """
    if is_sharded(weight):
        raise WeightError(f"site {key!r}: its weight is sharded; operate, load or merge before fully_shard")


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
    config: Variant, calibration: Any, form: str, lowering: str, keep_base: bool, seed: int, is_graph: bool
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
    known = ("auto", "lowrank", "residual") if is_graph else ("auto", "measure", *REGISTRY)
    if not isinstance(lowering, str) or lowering not in known:
        where = "in a graph " if is_graph else ""
        raise InputError(f"lowering {where}must be one of {', '.join(known)}; found {lowering!r:.80}")
    if form == "residual" and lowering not in ("auto", "residual"):
        raise InputError(f"form='residual' has one lowering: leave lowering out; found {lowering!r:.80}")
    form = "residual" if lowering == "residual" else form
    if not keep_base and (form != "residual" or is_graph):
        where = "the graph: use to_graph(model, inputs, form='residual', keep_base=False)" if is_graph else "the model"
        raise InputError(f"keep_base=False needs form='residual'; in delta form the base weight is part of {where}")
    return form, "residual" if form == "residual" and not is_graph else lowering


def check_form(form: Any) -> None:
    """Refuse what is no form of a site.

    Raises:
        InputError: says which there are.
    """
    if not isinstance(form, str) or form not in ("delta", "residual"):
        raise InputError(f"form must be 'delta' or 'residual', found {form!r:.80}")


def check_seed(seed: Any) -> None:
    """Refuse what is no seed.

    Raises:
        InputError: it is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be an integer, found {seed!r:.80}")


def check_flags(**flags: Any) -> None:
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
