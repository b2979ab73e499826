"""Where PEFT puts the factors of a site, the configuration that says so, and its own layers to fill and to read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from exporters.peft.low_rank import LowRank
from passes.capture.capture import is_pretrained
from surgery.errors import ExportError
from surgery.hosting.hosts import host_of
from surgery.modules.adapter import SSpaceLinear
from surgery.modules.graph_host_module import SSpaceNode
from surgery.storage.adapter_reader import module_paths, parameter_names

ADAPTER = "default"
ADVICE = "leave such sites out with exclude_modules when operating, or merge and export dense weights"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Place:
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


def places(model: nn.Module, found: Mapping[str, SSpaceLinear]) -> dict[str, Place]:
    """The place of every site.

    Raises:
        ExportError: some sites have none; all of them are listed.
    """
    chosen = {key: _place(model, key, site) for key, site in found.items()}
    modules = [place.module for place in chosen.values() if isinstance(place, Place)]
    for key, place in chosen.items():
        inside = [name for name in modules if isinstance(place, Place) and name.startswith(f"{place.module}.")]
        if inside and isinstance(place, Place) and place.parameter is not None:
            chosen[key] = f"PEFT would wrap its module, and cannot merge the site {inside[0]!r} inside of that"
    if refused := {key: place for key, place in chosen.items() if isinstance(place, str)}:
        why = "; ".join(f"{key!r}: {reason}" for key, reason in refused.items())
        raise ExportError(f"{len(refused)} of {len(found)} sites cannot be written for PEFT ({why}); {ADVICE}")
    return {key: place for key, place in chosen.items() if isinstance(place, Place)}


def _place(model: nn.Module, key: str, site: SSpaceLinear) -> Place | str:
    if isinstance(site, SSpaceNode):
        return "is inlined in a graph, which has no module to wrap; export the model that the graph was made of"
    if host_of(site) == "module":
        return Place(key)
    if getattr(site, "rows", None):
        return "is a part of a packed weight, which PEFT adapts whole"
    path, _, local = parameter_names(module_paths(model), site)[0].rpartition(".")
    owner, shape = model.get_submodule(path), site.factors.shape
    if not path:
        return "its weight is a parameter of the model itself, and PEFT wraps modules inside a model"
    if isinstance(owner, CONVOLUTIONS) and local == "weight" and owner.groups == 1 and site.factors.stack is None:
        return Place(path)
    stored = shape if site.layout == "out_in" else (*shape[:-2], shape[-1], shape[-2])
    if tuple(site.weight.shape) != stored:
        return f"its product sees a weight of shape {tuple(site.weight.shape)} as {tuple(shape)}, and PEFT does not"
    turned = site.factors.stack is not None and getattr(owner, "is_transposed", False)
    return Place(path, local, flipped=(site.layout == "in_out") != bool(turned))


def lora_config(model: nn.Module, targets: Mapping[Place, int]) -> Any:
    """PEFT's configuration for ranks by place, with a scaling of 1 everywhere.

    ``r`` and ``lora_alpha`` are the largest rank, so that a reader that knows no patterns has the right scaling too.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    rank = max(targets.values())
    # PEFT matches a pattern at the end of a name; with ^ it matches the whole name only
    pattern = {f"^{re.escape(place.name)}": r for place, r in targets.items() if r != rank}
    modules = sorted(place.name for place in targets if place.parameter is None)
    parameters = sorted(place.name for place in targets if place.parameter is not None)
    kinds = {type(model.get_submodule(name)).__name__ for name in modules}
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=kinds == {"Conv1D"},  # of a mixed model PEFT decides by each module
        inference_mode=True,
        task_type=_task(model),
        base_model_name_or_path=None if base and os.path.isabs(base) else base,
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
    hub: Any = model
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return None
    return "SEQ_2_SEQ_LM" if hub.config.is_encoder_decoder else "CAUSAL_LM"


def config_as_written(config: Any) -> dict[str, Any]:
    """The configuration as ``save_pretrained`` writes it, but with sets in order."""
    return {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}


def layers(wrapped: Any, base: Mapping[Place, nn.Module]) -> dict[Place, Any]:
    """PEFT's layer at each place.

    Args:
        base: the modules that were there before, which tell layers apart whatever they are nested in.

    Raises:
        ExportError: PEFT has wrapped something else.
    """
    from peft.tuners.lora import LoraLayer

    place_of = {(id(module), place.parameter): place for place, module in base.items()}
    found: dict[Place, Any] = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            place = place_of.get((id(layer.get_base_layer()), getattr(layer, "parameter_name", None)))
            if place is None:
                raise ExportError(f"PEFT adapts {name!r} too, which is no site")
            found[place] = layer
    if missing := [place.name for place in base if place not in found]:
        raise ExportError(f"PEFT does not adapt {missing[0]!r} ({len(missing)} such)")
    return found


def fill(layer: Any, place: Place, factors: LowRank) -> None:
    """Give PEFT's layer the factors of a site.

    Raises:
        ExportError: the layer has other shapes.
    """
    B, A = (factors.A.mT, factors.B.mT) if place.flipped else (factors.B, factors.A)
    if A.dim() == 3:  # experts: (stack * r, d_in), and (d_out, r * stack) with the stack running fastest
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    for linear, factor in ((layer.lora_A[ADAPTER], A), (layer.lora_B[ADAPTER], B)):
        extra = linear.weight.dim() - factor.dim()  # of a 1x1 convolution
        factor = factor.reshape(*factor.shape, *[1] * extra) if extra > 0 else factor
        if linear.weight.shape != factor.shape:
            raise ExportError(
                f"PEFT's layer of {place.name!r} has factors of shape {tuple(linear.weight.shape)}, "
                f"those of the site have {tuple(factor.shape)}"
            )
        linear.weight = nn.Parameter(factor.detach().contiguous(), requires_grad=False)


def delta_of(layer: Any) -> torch.Tensor:
    """The change of the weight that PEFT computes, scaling included, in the weight's layout."""
    with torch.no_grad():
        delta: torch.Tensor = layer.get_delta_weight(ADAPTER)
    return delta
