"""Dense weights ``W + dW``: a Hugging Face folder that plain ``transformers`` loads, or the state dict of any module.

A ``transformers`` model is saved by its own ``save_pretrained``: configuration, generation configuration and weights,
under the names of its checkpoints. Tokenizer and processor go along where the model was loaded from a folder, or one is
given. Any other module becomes ``model.safetensors``, which has every name of its state dict. The folder is loaded
again, every tensor is compared bit for bit, every merged weight with ``W + dW`` in float64, and the outputs with those
of the model.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from exporters.checkpoint.folder import SINGLE, other_files
from exporters.checkpoint.verify import merge_error
from exporters.onnx.runtime import TOLERANCE
from exporters.shared.report import Exported, inputs_for, working_copy
from passes.analysis.linear_sites import part_of
from passes.capture.capture import default_inputs, is_pretrained
from passes.errors import InputError
from passes.infra.tolerance import relative_error
from passes.ir.forward_context import quiet, set_mode
from passes.ir.torch_internals import tree_iter
from surgery.errors import ExportError
from surgery.storage.adapter_reader import module_paths, parameter_names
from surgery.support.untrusted_files import read_json
from surgery.verbs.steer_and_merge import merge, sites

DEFAULT_NAME = None
NEEDS_INPUTS = False  # without, weights alone are compared
LIMITS = {**TOLERANCE, torch.bfloat16: 8 * TOLERANCE[torch.float16]}  # three bits fewer than float16


def write(
    model: nn.Module,
    path: Path,
    example_inputs: Any,
    untie: bool = False,
    max_shard_size: int | str | None = None,
    tokenizer: Any = None,
) -> Exported:
    """Fill a folder with the merged model, and compare what can be loaded from it with the model.

    Args:
        untie: give a site whose weight is shared with another module a weight of its own.
        max_shard_size: of a ``transformers`` model's files, such as "5GB"; transformers' default if None.
        tokenizer: a tokenizer or processor to save along; by default that of the folder the model was loaded from.

    Raises:
        ExportError: the model cannot be saved, or what was saved is not the model.
        WeightError: a weight is tied and ``untie`` is false.
        VariantError: a variant is not linear, so that no weight has the same effect.
    """
    reference = working_copy(model)
    found = sites(reference)
    subject = merge(working_copy(model), untie=untie) if found else reference
    names = _merged_names(reference, subject)
    state = _state(subject)
    try:
        if is_pretrained(subject):
            _save_pretrained(subject, path, max_shard_size, tokenizer, untie=untie)
            loaded = _load_pretrained(subject, path)
        else:
            _save_state(state, path, max_shard_size, tokenizer)
            loaded = _load_state(subject, path)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise ExportError(f"{type(model).__name__} cannot be saved: {type(error).__name__}: {reason}") from error
    stored = _compare_tensors(state, _state(loaded))
    parts = {key: part_of(stored[names[key]], getattr(site, "rows", None)) for key, site in found.items()}
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


def _save_pretrained(model: Any, path: Path, max_shard_size: int | str | None, tokenizer: Any, *, untie: bool) -> None:
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if untie:  # the configuration then ties nothing: what else shares a tensor must be saved under each name
        options["state_dict"] = _unshared(model.state_dict())
    with _no_bars(), quiet("transformers"):
        model.save_pretrained(path, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    source = Path(model.name_or_path) if model.name_or_path else None
    if tokenizer is None and source is not None and source.is_dir():
        for file in other_files(source):
            if not (path / file.name).exists():
                shutil.copyfile(file, path / file.name)


def _load_pretrained(model: Any, path: Path) -> nn.Module:
    """The model that ``transformers`` makes of the folder, by the class that the configuration names."""
    import transformers

    (name,) = read_json(path / "config.json", finite=False)["architectures"]
    options = {"attn_implementation": model.config._attn_implementation, "local_files_only": True}
    with _no_bars(), quiet("transformers"):
        loaded = getattr(transformers, name, type(model)).from_pretrained(path, use_safetensors=True, **options)
    tied = [getattr(one.config, "tie_word_embeddings", False) for one in (model, loaded)]
    if tied == [False, True]:
        raise ExportError(f"{name} does not take tie_word_embeddings=false, so it cannot be untied")
    return loaded.to(model.device).eval()  # type: ignore[no-any-return]


def _save_state(state: dict[str, torch.Tensor], path: Path, max_shard_size: int | str | None, tokenizer: Any) -> None:
    if given := [n for n, v in (("max_shard_size", max_shard_size), ("tokenizer", tokenizer)) if v is not None]:
        raise ExportError(f"{given[0]} is for transformers models")
    save_file(_unshared(state), path / SINGLE, {"format": "pt"})


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by name, each with memory of its own, so that whoever loads them finds every name."""
    seen: set[int] = set()
    own = {}
    for name, value in state.items():
        pointer = value.untyped_storage().data_ptr()
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes and pointer not in seen
        own[name] = value.detach() if whole else value.detach().clone(memory_format=torch.contiguous_format)
        seen.add(pointer)
    return own


def _load_state(model: nn.Module, path: Path) -> nn.Module:
    """A copy of the module with no value of its own, and the file's values."""
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for value in loaded.state_dict().values():
            value.zero_()
    loaded.load_state_dict(load_file(path / SINGLE))
    set_mode(loaded, training=False)
    return loaded


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


def _compare_outputs(model: nn.Module, loaded: nn.Module, example_inputs: Any) -> float:
    """Largest deviation of an output, relative to its largest entry.

    Raises:
        InputError: the model does not run on the inputs.
        ExportError: the deviation is more than the dtype allows.
    """
    args, kwargs = inputs_for(model, example_inputs)
    try:
        with torch.no_grad():
            expected = _tensors(model(*args, **kwargs))
    except Exception as error:
        raise InputError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error
    with torch.no_grad():
        found = _tensors(loaded(*args, **kwargs))
    if len(found) != len(expected):
        raise ExportError(f"the loaded model has {len(found)} outputs, the model {len(expected)}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    worst = max((relative_error(*pair) for pair in zip(found, expected, strict=True)), default=0.0)
    if not worst <= LIMITS.get(dtype, LIMITS[torch.float32]):
        limit = LIMITS.get(dtype, LIMITS[torch.float32])
        raise ExportError(f"the loaded model differs by {worst:.3g} of the largest output, allowed is {limit:.0e}")
    return worst


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(output) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
