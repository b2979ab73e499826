"""Dense weights ``W + dW``: a Hugging Face folder that plain ``transformers`` loads, or the state dict of any module.

A ``transformers`` model is saved by its own ``save_pretrained``: configuration, generation configuration and weights,
under the names of its checkpoints. Tokenizer and processor go along where the model was loaded from a folder, or one is
given. Every other module becomes ``model.safetensors``, which has every name of its state dict. The folder is loaded
again, every tensor is compared bit for bit, every merged weight with ``W + dW`` in float64, and the outputs with those
of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from exporters.checkpoint.folder import SINGLE
from exporters.checkpoint.save_and_load import Saves, load_pretrained, load_state, save_pretrained, unshared
from exporters.checkpoint.verify import merge_error
from exporters.shared.export_report import Exported, example_call, working_copy
from exporters.shared.failures import run_on_examples, type_and_message
from exporters.shared.options import option
from passes.analysis.linear_sites import part_of
from passes.capture.capture import default_inputs, is_pretrained
from passes.infra.tolerance import ELSEWHERE, relative_error
from passes.ir.forward_context import copied, state_kept
from passes.ir.torch_internals import tree_iter
from surgery.errors import ExportError
from surgery.hosting.state import module_paths, parameter_names
from surgery.verbs.merge import merge
from surgery.verbs.steer import sites

DEFAULT_NAME = None
NEEDS_INPUTS = False  # without, weights alone are compared


@dataclass(frozen=True)
class Options:
    """Options of the format "dense"."""

    untie: bool = option(False, "give a site whose weight is shared with another module a weight of its own")
    max_shard_size: int | str | None = option(None, "of a transformers model's files, such as 5GB")
    tokenizer: Saves | None = option(None, "to save along; by default that of the folder the model was loaded from")


def write(model: nn.Module, path: Path, example_inputs: object, options: Options) -> Exported:
    """Fill a folder with the merged model, and compare what can be loaded from it with the model.

    Raises:
        ExportError: the model cannot be saved, or what was saved is not the model.
        WeightError: a weight is tied and ``untie`` is false; or it is of a kind that takes no change.
        VariantError: a variant is not linear, so that no weight has the same effect.
    """
    reference = working_copy(model)
    found = sites(reference)
    subject = merge(working_copy(model), untie=options.untie) if found else reference
    names = _merged_names(reference, subject)
    state = _state(subject)
    try:
        if is_pretrained(subject):
            save_pretrained(
                subject,
                path,
                max_shard_size=options.max_shard_size,
                tokenizer=options.tokenizer,
                untie=options.untie,
            )
            loaded = load_pretrained(subject, path)
        else:
            for name in ("max_shard_size", "tokenizer"):
                if getattr(options, name) is not None:
                    raise ExportError(f"{name} is for transformers models")
            save_file(unshared(state), path / SINGLE, {"format": "pt"})
            loaded = load_state(subject, path)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise ExportError(f"{type(model).__name__} cannot be saved: {type_and_message(error)}") from error
    stored = _compare_tensors(state, _state(loaded))
    parts = {key: part_of(stored[names[key]], site.rows) for key, site in found.items()}
    weights = max((merge_error(site, key, parts[key]) for key, site in found.items()), default=0.0)
    details = {"sites": len(found), "weight_error": weights}
    if example_inputs is None and default_inputs(model) is None:
        return Exported(weights, {**details, "compared": "weights"})
    return Exported(_compare_outputs(reference, loaded, example_inputs), {**details, "compared": "weights and outputs"})


def _merged_names(reference: nn.Module, merged: nn.Module) -> dict[str, str]:
    """The parameter that the merged weight of each site is: the base's, or where a graph unties it one of its own."""
    before = {parameter.data_ptr() for parameter in reference.parameters()}
    new = [n for n, p in merged.named_parameters(remove_duplicate=False) if p.data_ptr() not in before]
    names, paths = {}, module_paths(reference)
    for key, site in sites(reference).items():
        own = (parameter_names(paths, site)[0], f"{key}.weight")
        named = f"{key.replace('.', '_')}_merged_"
        names[key] = next(name for name in (*own, *new) if name in new and (name in own or name.startswith(named)))
    return names


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ExportError(f"the state dict's {other[0]!r} is no tensor, so safetensors cannot hold it")
    if absent := [name for name, value in state.items() if value.is_meta]:
        raise ExportError(f"{absent[0]!r} is on the meta device: there are no values to save")
    return state


def _compare_tensors(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compare bit for bit; transformers may load some weights in more precision than the model has.

    Returns:
        What was loaded.

    Raises:
        ExportError: a tensor is missing or differs.
    """
    stored = {}
    for name, value in saved.items():
        if name not in loaded or loaded[name].shape != value.shape:
            raise ExportError(f"{name!r} cannot be loaded again from what was saved")
        stored[name] = loaded[name].to(value)
        if not torch.equal(_bytes(stored[name]), _bytes(value)):
            raise ExportError(f"{name!r} is not what was saved when it is loaded again")
    return stored


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _compare_outputs(model: nn.Module, loaded: nn.Module, example_inputs: object) -> float:
    """Largest deviation of an output, relative to its largest entry.

    Raises:
        InputError: the model does not run on the inputs.
        ExportError: the deviation is more than the dtype allows.
    """
    args, kwargs = example_call(model, example_inputs)
    with torch.no_grad():
        with state_kept(model):
            expected = _tensors(run_on_examples(model, copied((args, kwargs))))
        found = _tensors(loaded(*args, **kwargs))
    if len(found) != len(expected):
        raise ExportError(f"the loaded model has {len(found)} outputs, the model {len(expected)}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    worst = max((relative_error(*pair) for pair in zip(found, expected, strict=True)), default=0.0)
    if not worst <= (limit := ELSEWHERE.get(dtype, ELSEWHERE[torch.float32])):
        raise ExportError(f"the loaded model differs by {worst:.3g} of the largest output, allowed is {limit:.0e}")
    return worst


def _tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(output) if isinstance(leaf, torch.Tensor)]
