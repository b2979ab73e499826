"""Save and load adapter directories: atomic, fingerprinted, no pickle.

``adapter_model.safetensors`` is the adapter: its header holds the configuration (format 3, see
``surgery.storage.adapter_file``)::

    {"sha256": "...", "format": "sspace-adapter", "format_version": 3, "variant": "antipasto", "hyperparameters": {...},
     "factors": "exact", "base_model_name_or_path": "Qwen/Qwen3-0.6B", "targets": ["...", ...],
     "sites": {"model.layers.0.mlp.up_proj": {"weight": "...weight", "bias": null, "layout": "out_in", "host": "module",
               "shape": [d_out, d_in], "r": 64, "seed": 0, "dtype": "float32", "fingerprint": "sha256:...",
               "casts": {"bfloat16": "sha256:...", ...}}, ...}}

Its tensors are ``<site>.core.<name>`` and ``<site>.factors.{U,S,Vh}``, or where ``factors`` is "recompute"
``<site>.digest`` in their place (see ``surgery.storage.factor_digest``). A site of another variant than the first has
``variant`` and ``hyperparameters`` of its own. The shape of a site on a stack of matrices is ``[stack, d_out, d_in]``,
and its tensors have one more dimension in front. A site that is a part of a packed weight has ``rows``, ``[first, one
after the last]``. Everything is checked before the model is touched.

Optional fields: ``trained``, what was trained beside the cores (see ``surgery.storage.trained_parameters``); ``coeff``,
a coefficient that was not 1; ``base_config``, the configuration of a ``transformers`` model, of ``save_pretrained``.

``adapter_config.json`` mirrors the configuration for people and other libraries, ``README.md`` is a model card; neither
is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from passes.ir.forward_context import ExampleInputs
from surgery.errors import AdapterError
from surgery.hosting.graph_surgery import products_of
from surgery.hosting.state import (
    adapters_in,
    adapters_of,
    check_weights,
    module_paths,
    parameter_names,
    record_of,
    require_bases,
    unwrap,
)
from surgery.storage.adapter_config import STORED
from surgery.storage.adapter_reader import read_adapter
from surgery.storage.adapter_writer import AdapterContent, adapter_content
from surgery.storage.model_card import CARD, may_write
from surgery.storage.saved_values import SavedValues
from surgery.storage.trainer_files import CHECKPOINT, checkpoint_file, is_refusing
from surgery.support.atomic_directory import Content, write_directory
from surgery.support.distributed import by_first_process
from surgery.support.progress_bar import wanted_on
from surgery.support.untrusted_files import JsonObject, path_of
from surgery.verbs.apply import Model, resolve_model
from surgery.verbs.replace_adapters import replace_adapters
from surgery.verbs.steer import get_coeff

MOST_NOTED = 2**12  # coefficients in a header


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, factors: str = "exact", progress: bool | None = None
) -> Path:
    """Write the adapter of an operated model to a directory; the same adapter always gives the same bytes.

    Parameters outside the cores that require gradients are saved with them, and so are small buffers that training has
    written to, as running statistics. A coefficient that is not 1 is noted, with a warning.

    Of a model in shards (``fully_shard``) every process has to call this; the first one writes.

    A ``README.md`` that somebody wrote or edited there is kept: a card that this package wrote ends with a comment that
    holds its own digest, and only such a card, or none, is replaced.

    Args:
        path: a new directory, or an existing one, whose adapter is replaced and whose other files are kept.
        factors: "exact" stores the factors that were used. "recompute" stores a digest of them, in some hundred bytes
            per site: whoever loads the adapter recomputes them from the weight, in one thread, to within 1e-4.
        progress: show a progress bar; None: on a terminal.

    Returns:
        The directory.

    Raises:
        AdapterError: the path is a file, or cannot be written; factors that are to be recomputed were chosen by
            calibration. What was there is still there.
        SurgeryError: the model carries no surgery.
    """
    model, path = unwrap(model), path_of(path, AdapterError)
    record_of(model)
    bars = wanted_on(progress)
    if not isinstance(factors, str) or factors not in STORED:
        raise AdapterError(f"factors must be 'exact' or 'recompute', found {factors!r:.80}")
    check_weights(adapters_of(model))
    coefficient = coefficient_entry(model)
    values = SavedValues(model)
    content = adapter_content(model, values, coefficient, factors=factors, progress=bars)
    more = {CHECKPOINT: checkpoint_file(model, values)} if is_refusing(path) else {}  # of the adapter that is replaced
    by_first_process(model.parameters(), lambda: write_adapter(path, content, more))
    say_coefficient(coefficient, f"saved to {str(path)!r}")
    return path


def write_adapter(path: Path, content: AdapterContent, more: Mapping[str, Content] | None = None) -> None:
    """Write an adapter to a directory, and further files with it.

    Raises:
        AdapterError: it cannot be written; what was there is still there.
    """
    files = content.files | dict(more or {})
    try:
        write_directory(path, files | {CARD: [content.page]} if may_write(path) else files)
    except OSError as error:
        raise AdapterError(f"cannot write an adapter to {str(path)!r}: {error}; what was there is unchanged") from error


def coefficient_entry(model: nn.Module) -> JsonObject:
    """What a file says of a coefficient that is not 1."""
    coeff = get_coeff(model)
    if isinstance(coeff, dict):
        return {"coeff": {name: _as_noted(value) for name, value in coeff.items()}}
    if isinstance(coeff, torch.Tensor):
        return {"coeff": _as_noted(coeff)}
    return {} if coeff == 1.0 else {"coeff": coeff}


def _as_noted(value: torch.Tensor) -> list[float] | str:
    """Coefficients of rows or tokens in a header, which has to stay small."""
    return value.tolist() if value.numel() <= MOST_NOTED else f"a tensor of shape {list(value.shape)}"


def say_coefficient(config: JsonObject, what: str) -> None:
    """Warn that an adapter was saved at another coefficient than the one that it has after loading."""
    if (coeff := config.get("coeff")) is not None:
        shown = f"{coeff:g}" if isinstance(coeff, int | float) else "not one number for all rows"
        warnings.warn(
            f"the adapter was {what} while coeff was {shown}: its file notes that, and loading sets coeff to 1; "
            "call set_coeff after load_adapter",
            stacklevel=3,
        )


def load_adapter(
    model: Model,
    path: str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs | None = None,
    progress: bool | None = None,
) -> Model:
    """Put a saved adapter on the model it was made for, in place; ``coeff`` is 1.

    The model may be on any device, and in another dtype than the one that the adapter was made in: the adapter is then
    what a cast of the operated model would have made of it. Factors cannot be recomputed from rounded weights.

    Args:
        example_inputs: to convert a TorchScript module with, which gives a new graph module.
        progress: show a progress bar where factors are recomputed; None: on a terminal.

    An adapter that the model already carries is replaced. Nothing is captured: the file says how each site is hosted.
    What was trained beside the cores takes the place of the model's own parameters, until ``undo_surgery``.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model, or recomputed factors come out
            differently here; the model is untouched.
    """
    given: Model
    bars = wanted_on(progress)
    (given, module), path = resolve_model(model, example_inputs), path_of(path, AdapterError)
    paths = module_paths(module)
    present, products = adapters_in(paths), products_of(module)
    require_bases(present)
    named = {parameter_names(paths, site)[0]: site.host.parameter() for site in present.values()}
    loaded = read_adapter(module, path, named, products, progress=bars)
    replace_adapters(module, present, products, lambda: (loaded.plans, loaded.notes), loaded.trained)
    say_coefficient(loaded.config, f"in {str(path)!r} saved")
    return given
