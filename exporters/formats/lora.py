"""LoRA: a PEFT directory, ``B A = U D^T Vh`` at the numerical rank of the change, with a scaling of 1 at every site.

Where D has full rank, ``A = Vh`` and ``B = U D^T``; ablation of k directions has rank k; a core at identity has rank 1
and ``B = 0``, so that every site stays in the adapter. ``max_rank`` leaves out the smallest singular values of the
change itself, which is the best that a LoRA of that rank can do, for oblique factors (CorDA) too. Linear modules,
``Conv1D`` and 1x1 convolutions are PEFT's ``target_modules``; weights that a called module reads, such as stacked
experts, are its ``target_parameters``; modules trained beside the cores are its ``modules_to_save``. Names of tensors
are PEFT's own, and what it loads is compared with the model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from exporters.peft.layers import PeftTarget, config_as_written, fill, layers, lora_config, peft_targets
from exporters.peft.low_rank import LowRankProduct, low_rank
from exporters.peft.peft_check import check_sites, output_deviation, outputs_of, wrapped_outputs
from exporters.peft.saved_modules import BesideCores, kept_whole
from exporters.shared.export_report import Exported, example_call, need, working_copy
from exporters.shared.options import option
from passes.capture.capture import hub_inputs, is_pretrained
from passes.errors import InputError
from passes.infra.tolerance import RELATIVE
from passes.ir.forward_context import quiet
from surgery.errors import ExportError, VariantError, WeightError
from surgery.modules.adapter import Adapter
from surgery.modules.merged_weight import why_not_finite
from surgery.verbs.apply import restore_base
from surgery.verbs.steer import sites

if TYPE_CHECKING:
    from peft import LoraConfig

DEFAULT_NAME = None
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NOISY = ("peft", "transformers")


@dataclass(frozen=True)
class Options:
    """Options of the format "lora"."""

    max_rank: int | None = option(None, "upper bound of the rank, such as vLLM's default of 16")
    prune_tol: float = option(
        0.0, "leave out directions whose singular value is at most this share of their site's largest"
    )
    dtype: torch.dtype | None = option(None, "of the written factors; float32, of a float64 model float64, if None")
    base_model: str | None = option(None, "hub id or folder to name as the base; the model's own hub id if None")

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise ExportError(f"max_rank must be a whole number of at least 1, found {self.max_rank!r}")
        if not 0 <= self.prune_tol < 1:
            raise ExportError(f"prune_tol must be a number from 0 to below 1, found {self.prune_tol!r}")
        if self.dtype is not None and self.dtype not in RELATIVE:
            names = ", ".join(str(d) for d in RELATIVE)
            raise ExportError(f"dtype must be one of {names}, found {self.dtype!r}")


def write(model: nn.Module, path: Path, example_inputs: object, options: Options) -> Exported:
    """Write a PEFT directory and compare the model that PEFT makes of it with this one.

    Raises:
        ExportError: the model carries no surgery, PEFT has no target for a site, or its results differ.
        VariantError: a variant is not linear in its input.
        WeightError: pruned or rounded factors are to be compared with a merged weight, of a kind that takes no change.
        InputError: coeff steers rows, or the model does not run on the example inputs.
    """
    peft = need("peft", "lora")
    found = sites(model)
    if not found:
        raise ExportError(f"a LoRA needs an adapter, and {type(model).__name__} carries none")
    where = peft_targets(model, found)
    wide = torch.float64 if any(site.base_weight.dtype == torch.float64 for site in found.values()) else torch.float32
    written = options.dtype or wide
    call = example_call(model, example_inputs)
    call = ((), hub_inputs(model, call)) if is_pretrained(model) else call
    expected = outputs_of(working_copy(model), call)
    factors = {key: _factors(key, site, written, options) for key, site in found.items()}
    beside = kept_whole(model, where.values())
    ranks = {target: factors[key].rank for key, target in where.items()}
    config = lora_config(
        _base(model), ranks, options.base_model, modules_to_save=beside.modules, biases=bool(beside.biases)
    )
    with torch.random.fork_rng(devices=[]), quiet(*NOISY), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells what it decides, layer by layer
        _save(peft, model, path, config, {where[key]: factors[key] for key in found}, beside)
        base = _base(model)
        beside.clear_in(base)
        before = {target: base.get_submodule(target.module) for target in where.values()}
        loaded = peft.PeftModel.from_pretrained(base, path).eval()
        adapted = layers(loaded, before)
    check_sites(found, {key: adapted[where[key]] for key in found}, factors)
    outputs = wrapped_outputs(loaded.get_base_model(), call, {where[key]: adapted[where[key]] for key in found})
    limit = max(RELATIVE[d] for d in {written, *(site.base_weight.dtype for site in found.values())})
    lossy = written.itemsize < wide.itemsize or any(factor.pruned for factor in factors.values())
    wanted_outputs = outputs_of(_written_model(model, factors), call) if lossy else expected
    if not (error := output_deviation(outputs, wanted_outputs)) <= limit:
        whose = "a model of the pruned or rounded weights" if lossy else "the model"
        raise ExportError(
            f"PEFT's outputs differ from those of {whose} by {error:.3g} of the largest, allowed {limit:.0e}"
        )
    details = _details(path, found, factors, written) | ({"beside": sorted(beside.values)} if beside.values else {})
    return Exported(output_deviation(outputs, expected), details)


def _factors(key: str, site: Adapter, dtype: torch.dtype, options: Options) -> LowRankProduct:
    with torch.no_grad():
        try:
            B = site.delta_factor(torch.float64)
        except (VariantError, InputError) as error:
            raise type(error)(f"site {key!r}: {error}") from error
        A = site.factors.Vh.to(torch.float64)
        if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
            raise ExportError(f"site {key!r}: {why_not_finite(site, 'the change of its weight overflows float64')}")
        made = low_rank(B, A, dtype, options.max_rank, options.prune_tol)
    if not (torch.isfinite(made.B).all() and torch.isfinite(made.A).all()):
        raise ExportError(f"site {key!r}: its factors overflow {dtype}; use a wider dtype")
    return made


def _base(model: nn.Module) -> nn.Module:
    """The model without its adapters, on the same memory."""
    return restore_base(working_copy(model))


def _save(
    peft: ModuleType,
    model: nn.Module,
    path: Path,
    config: LoraConfig,
    factors: Mapping[PeftTarget, LowRankProduct],
    beside: BesideCores,
) -> None:
    """Write what PEFT would write of a model that has these factors: it names the tensors."""
    text = json.dumps(config_as_written(config), indent=2, sort_keys=True)
    base = _base(model)
    before = {target: base.get_submodule(target.module) for target in factors}
    try:
        wrapped = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ExportError(f"PEFT cannot wrap {type(base).__name__}: {error}") from error
    for target, layer in layers(wrapped, before).items():
        fill(layer, target, factors[target])
    beside.put_into(wrapped)
    named = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    save_file({name: t.cpu().contiguous() for name, t in named.items()}, path / TENSORS, metadata={"format": "pt"})
    (path / CONFIG).write_text(text + "\n")


def _written_model(model: nn.Module, factors: Mapping[str, LowRankProduct]) -> nn.Module:
    """The model with dense weights that hold what was written."""
    copy = working_copy(model)
    for key, site in sites(copy).items():
        with torch.no_grad():
            weight = site.base_weight.with_delta(factors[key].B.to(torch.float64), factors[key].A)
        if isinstance(weight, str):
            raise WeightError(f"site {key!r} cannot be merged, to compare with: {weight}")
        site.host.put_weight(weight)
    return copy


def _details(
    path: Path, found: Mapping[str, Adapter], factors: Mapping[str, LowRankProduct], dtype: torch.dtype
) -> dict[str, object]:
    each = {
        key: {
            "rank": made.rank,
            "r": found[key].factors.rank,
            "pruned": made.pruned,
            "spectral_error": made.spectral_error,
            "frobenius_error": made.frobenius_error,
        }
        for key, made in factors.items()
    }
    return {
        "rank": max(made.rank for made in factors.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": (path / TENSORS).stat().st_size,
        "spectral_error": max(made.spectral_error for made in factors.values()),
        "frobenius_error": max(made.frobenius_error for made in factors.values()),
        "sites": each,
    }
