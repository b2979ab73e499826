"""Where PEFT puts the factors of a site, the configuration that says so, and its own layers to fill and to read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from exporters.peft.low_rank import LowRankProduct
from passes.capture.capture import is_pretrained
from surgery.errors import ExportError
from surgery.hosting.state import module_paths, parameter_names
from surgery.modules.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
ADVICE = "leave such sites out with exclude_modules when operating, or merge and export dense weights"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class PeftTarget:
    """What PEFT wraps for a site.

    Attributes:
        module: name of the module that is wrapped.
        parameter: name in it of the parameter that is adapted by itself (``target_parameters``), or None where the
            module's output is.
        flipped: PEFT's product is the transpose of the site's.
    """

    module: str
    parameter: str | None = None
    flipped: bool = False

    @property
    def name(self) -> str:
        """As PEFT names the target."""
        return self.module if self.parameter is None else f"{self.module}.{self.parameter}"


def peft_targets(model: nn.Module, found: Mapping[str, Adapter]) -> dict[str, PeftTarget]:
    """The target of every site.

    Raises:
        ExportError: some sites have none; all of them are listed.
    """
    chosen = {key: _target_of(model, key, site) for key, site in found.items()}
    modules = [target.module for target in chosen.values() if isinstance(target, PeftTarget)]
    for key, target in chosen.items():
        inside = [name for name in modules if isinstance(target, PeftTarget) and name.startswith(f"{target.module}.")]
        if inside and isinstance(target, PeftTarget) and target.parameter is not None:
            chosen[key] = f"PEFT would wrap its module, and cannot merge the site {inside[0]!r} inside of that"
    if refused := {key: target for key, target in chosen.items() if isinstance(target, str)}:
        why = "; ".join(f"{key!r}: {reason}" for key, reason in refused.items())
        raise ExportError(f"{len(refused)} of {len(found)} sites cannot be written for PEFT ({why}); {ADVICE}")
    return {key: target for key, target in chosen.items() if isinstance(target, PeftTarget)}


def _target_of(model: nn.Module, key: str, site: Adapter) -> PeftTarget | str:
    if site.host.inlined:
        return "is inlined in a graph, which has no module to wrap; export the model that the graph was made of"
    if site.rows:
        return "is a part of a packed weight, which PEFT adapts whole"
    path, _, local = parameter_names(module_paths(model), site)[0].rpartition(".")
    owner, shape = model.get_submodule(path), site.factors.shape
    if isinstance(owner, CONVOLUTIONS) and local == "weight" and path:
        return _why_no_convolution(owner) or PeftTarget(path)
    if site.host.name == "module":
        return PeftTarget(key)
    if not path:
        return "its weight is a parameter of the model itself, and PEFT wraps modules inside a model"
    stored = shape if site.layout == "out_in" else (*shape[:-2], shape[-1], shape[-2])
    if tuple(site.weight.shape) != stored:
        return f"its product sees a weight of shape {tuple(site.weight.shape)} as {tuple(shape)}, and PEFT does not"
    turned = site.factors.stack is not None and getattr(owner, "is_transposed", False)
    return PeftTarget(path, local, flipped=(site.layout == "in_out") != bool(turned))


def _why_no_convolution(owner: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    """Why PEFT's pair of convolutions, which have kernel, stride and padding of their own, is not that of a site."""
    if owner.groups != 1:
        return f"its {owner.groups} groups have factors each, and PEFT gives a convolution one pair"
    if any(gap != 1 and size != 1 for gap, size in zip(owner.dilation, owner.kernel_size, strict=True)):
        return f"its kernel is dilated by {owner.dilation}, and PEFT's is not"
    if owner.padding_mode != "zeros" and (isinstance(owner.padding, str) or any(owner.padding)):
        return f"its padding is {owner.padding_mode!r}, and PEFT pads with zeros"
    return None


def lora_config(
    model: nn.Module,
    targets: Mapping[PeftTarget, int],
    base_model: str | None = None,
    *,
    modules_to_save: Sequence[str] = (),
    biases: bool = False,
) -> LoraConfig:
    """PEFT's configuration for ranks by target, with a scaling of 1 everywhere.

    ``r`` and ``lora_alpha`` are the largest rank, so that a reader that knows no patterns has the right scaling too.

    Args:
        base_model: what to name as the base; the model's own name if None, unless that is a folder of this machine.
        modules_to_save: modules that the adapter has whole.
        biases: whether it has the biases of the modules that it wraps.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    rank = max(targets.values())
    # PEFT matches a pattern at the end of a name; with ^ it matches the whole name only
    pattern = {f"^{re.escape(target.name)}": r for target, r in targets.items() if r != rank}
    modules = sorted(target.name for target in targets if target.parameter is None)
    parameters = sorted(target.name for target in targets if target.parameter is not None)
    kinds = {type(model.get_submodule(name)).__name__ for name in modules}
    own = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=kinds == {"Conv1D"},  # of a mixed model PEFT decides by each module
        modules_to_save=list(modules_to_save) or None,
        bias="lora_only" if biases else "none",
        inference_mode=True,
        task_type=_task(model),
        base_model_name_or_path=base_model or (None if own and os.path.isabs(own) else own),
    )
    names = [name for name, _ in model.named_modules() if name]
    if [name for name in names if check_target_module_exists(config, name)] != [n for n in names if n in modules]:
        config.target_modules = "|".join(map(re.escape, modules))  # a name in the list ends another module's
    if config.task_type is None and is_pretrained(model):
        config.auto_mapping = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    return config


def _task(model: nn.Module) -> str | None:
    """The task of a language model; of classifiers PEFT would make the head a trained copy that the file must hold."""
    if not is_pretrained(model) or getattr(model, "main_input_name", "") != "input_ids":
        return None
    hub: PreTrainedModel = model
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return None
    return "SEQ_2_SEQ_LM" if hub.config.is_encoder_decoder else "CAUSAL_LM"


def config_as_written(config: LoraConfig) -> dict[str, object]:
    """The configuration as ``save_pretrained`` writes it, but with sets in order."""
    return {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}


def layers(wrapped: PeftModel, base: Mapping[PeftTarget, nn.Module]) -> dict[PeftTarget, LoraLayer]:
    """PEFT's layer at each target.

    Args:
        base: the modules that were there before, which tell layers apart whatever they are nested in.

    Raises:
        ExportError: PEFT has wrapped something else.
    """
    from peft.tuners.lora import LoraLayer

    target_of = {(id(module), target.parameter): target for target, module in base.items()}
    found: dict[PeftTarget, LoraLayer] = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            target = target_of.get((id(layer.get_base_layer()), getattr(layer, "parameter_name", None)))
            if target is None:
                raise ExportError(f"PEFT adapts {name!r} too, which is no site")
            found[target] = layer
    if missing := [target.name for target in base if target not in found]:
        raise ExportError(f"PEFT does not adapt {missing[0]!r} ({len(missing)} such)")
    return found


def fill(layer: LoraLayer, target: PeftTarget, factors: LowRankProduct) -> None:
    """Give PEFT's layer the factors of a site.

    Raises:
        ExportError: the layer has other shapes.
    """
    B, A = (factors.A.mT, factors.B.mT) if target.flipped else (factors.B, factors.A)
    if A.dim() == 3:  # experts: (stack * r, d_in), and (d_out, r * stack) with the stack running fastest
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    for linear, factor in ((layer.lora_A[ADAPTER], A), (layer.lora_B[ADAPTER], B)):
        if linear.weight.dim() > 2 and linear.weight.numel() == factor.numel():  # a convolution, and one of 1x1
            factor = factor.reshape(linear.weight.shape)
        if linear.weight.shape != factor.shape:
            raise ExportError(
                f"PEFT's layer of {target.name!r} has factors of shape {tuple(linear.weight.shape)}, "
                f"those of the site have {tuple(factor.shape)}"
            )
        linear.weight = nn.Parameter(factor.detach().contiguous(), requires_grad=False)


def delta_of(layer: LoraLayer) -> torch.Tensor:
    """The change of the weight that PEFT computes, scaling included, in the weight's layout."""
    with torch.no_grad():
        delta: torch.Tensor = layer.get_delta_weight(ADAPTER)
    return delta
