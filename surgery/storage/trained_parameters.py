"""What was trained beside the cores in adapter files: a new head, biases, norms, whole embeddings, running statistics.

The configuration's optional field ``trained`` has the name of each tensor, with the other names that a tied one has::

    {"model.embed_tokens.weight": ["lm_head.weight"], "model.norm.weight": []}

Its tensor is ``trained.<name>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from passes.capture.capture import is_pretrained
from surgery.errors import AdapterError
from surgery.storage.adapter_file import StoredTensors
from surgery.storage.saved_names import SavedNames
from surgery.storage.site_entry import read_tensor
from surgery.support.distributed import is_sharded
from surgery.support.fingerprint import DTYPES, dtype_name
from surgery.support.untrusted_files import JsonObject

PREFIX = "trained."
BUFFER_DTYPES = (*DTYPES.values(), torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def trained_entries(
    beside: Mapping[str, torch.Tensor], names: SavedNames, value: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    """What a file says of what was trained beside the cores, and the tensors by name.

    Args:
        beside: parameters and buffers by their names without adapters.
        value: gives the whole value of one.

    Raises:
        AdapterError: one has a dtype that no file has.
    """
    first: dict[int, str] = {}
    entries: dict[str, list[str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in beside.items():
        saved = names.saved(name)
        if id(tensor) in first:
            others = entries[first[id(tensor)]]
            if saved not in (first[id(tensor)], *others):
                others.append(saved)
            continue
        if tensor.dtype not in (DTYPES.values() if isinstance(tensor, nn.Parameter) else BUFFER_DTYPES):
            raise AdapterError(
                f"{name!r} was trained and is {dtype_name(tensor)}; tensors beside the cores can be saved "
                f"in {', '.join(DTYPES)}: freeze it, or cast it"
            )
        first[id(tensor)] = saved
        entries[saved] = []
        tensors[PREFIX + saved] = value(tensor).detach().cpu().contiguous()
    return entries, tensors


def read_trained(
    model: nn.Module,
    where: str,
    config: JsonObject,
    names: SavedNames,
    parameters: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    tensors: StoredTensors,
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Read what was trained beside the cores, and check that a model has a place for each tensor.

    Args:
        parameters, buffers: the model's own, by every name.

    Returns:
        The tensors by every name in the model, and the names that they have in the file.

    Raises:
        AdapterError: the model has no such parameter, or one of another shape; a tensor is missing or damaged.
    """
    read: dict[str, torch.Tensor] = {}
    expected: set[str] = set()
    cast, present = is_cast(config, names, parameters), set(tensors.keys())
    model_has = {**buffers, **parameters}
    for saved, others in trained_field(where, config).items():
        found = [names.in_model(name) for name in (saved, *others)]
        for name in found:
            if name not in model_has:
                raise AdapterError(
                    f"{where}: {name!r} was trained beside the cores, and the model has no such parameter; add the "
                    "module that it belongs to before loading, or is it another base model?"
                )
            if name in read or found.count(name) > 1:
                raise AdapterError(f"{where}: the trained parameter {name!r} stands in the file twice")
        _check_ties(where, found, model_has)
        own = model_has[found[0]]
        shape = tuple(tensors.get_slice(PREFIX + saved).get_shape() if PREFIX + saved in present else own.shape)
        for name in found:
            _check_place(model, where, name, model_has[name], shape)
        dtypes = tuple(DTYPES.values()) if own.dtype in DTYPES.values() else (own.dtype,)
        value = read_tensor(where, tensors, PREFIX + saved, tuple(own.shape), dtypes)
        if cast and own.dtype in DTYPES.values():
            value = value.to(own.dtype)
            if not torch.isfinite(value).all():
                raise AdapterError(f"{where}: {saved!r} overflows {dtype_name(own)}; load it on a model in a wider one")
        value = value.to("cpu" if own.is_meta else own.device)
        read |= dict.fromkeys(found, nn.Parameter(value) if found[0] in parameters else value)
        expected.add(PREFIX + saved)
    return read, expected


def is_cast(config: JsonObject, names: SavedNames, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model has another dtype than the one that the adapter was saved from, by the weights of its sites."""
    for entry in config["sites"].values():
        weight, dtype = (entry.get(name) for name in ("weight", "dtype")) if isinstance(entry, dict) else (None, None)
        own = parameters.get(names.in_model(weight)) if isinstance(weight, str) else None
        if own is not None and own.dtype in DTYPES.values() and isinstance(dtype, str) and dtype in DTYPES:
            return own.dtype != DTYPES[dtype]
    return False


def trained_field(where: str, config: JsonObject) -> dict[str, list[str]]:
    """The names that a configuration has of parameters beside the cores, each with its other names.

    Raises:
        AdapterError: the field is damaged.
    """
    entries = config.get("trained", {})
    fits = isinstance(entries, dict) and all(
        isinstance(others, list) and all(isinstance(name, str) for name in others) for others in entries.values()
    )
    if not fits:
        raise AdapterError(f"{where}: 'trained' must be an object of lists of names, found {entries!r:.80}")
    return dict(entries)


def _check_ties(where: str, found: list[str], parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse to change what the model ties to a parameter and the file does not."""
    held = {id(parameters[name]) for name in found}
    if tied := [name for name, other in parameters.items() if id(other) in held and name not in found]:
        raise AdapterError(
            f"{where}: {found[0]!r} was trained beside the cores, and the model ties it to {tied[0]!r}, which the "
            "adapter's did not; is it another base model?"
        )


def _check_place(model: nn.Module, where: str, name: str, own: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a parameter of another shape, or one that lies in shards."""
    if is_sharded(own):
        raise AdapterError(f"{where}: {name!r} lies in shards; load the adapter before the model is sharded")
    if tuple(own.shape) == shape:
        return
    rows = len(shape) == own.dim() and shape[1:] == tuple(own.shape[1:]) and own.shape[:1] == _vocabulary(model)
    if rows:
        raise AdapterError(
            f"{where}: {name!r} was trained with {shape[0]} rows, one for each token, and the model's has "
            f"{own.shape[0]}: call model.resize_token_embeddings({shape[0]}) before load_adapter"
        )
    raise AdapterError(
        f"{where}: {name!r} was trained beside the cores with shape {list(shape)}, and the model's has "
        f"{list(own.shape)}; is it another base model?"
    )


def _vocabulary(model: nn.Module) -> torch.Size | None:
    """The number of rows of a ``transformers`` model's token embedding, as a size; None where it has none."""
    if not is_pretrained(model):
        return None
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding.weight.shape[:1] if isinstance(embedding, nn.Embedding) else None
