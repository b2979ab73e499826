"""Models to measure, with weights of a checkpoint or random ones, and inputs of a wanted size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from passes.capture.capture import default_inputs, forward_call, is_pretrained, keyword_inputs
from passes.errors import InputError
from passes.ir.forward_context import Call, quiet
from passes.ir.torch_internals import tree_map_only
from surgery.cli.inspect import is_callable, load_model
from surgery.support.hf_config import first_line, hub_config, model_class

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def device_of(name: str) -> torch.device:
    """A device by name; "auto" is an accelerator if there is one, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.empty(1, device=name)
        torch.get_device_module(name)  # "meta" has none: nothing is computed there
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"there is no device {name!r} here: {first_line(error)}") from error


def device_name(device: torch.device) -> str:
    """What a device is called in a row: with its model, or its threads."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' * (threads > 1)})"
    module = torch.get_device_module(device)
    return f"{device} ({module.get_device_name(device)})" if hasattr(module, "get_device_name") else str(device)


def load(
    source: str, *, config_only: bool = False, device: torch.device, dtype: str = "auto", seed: int = 0
) -> tuple[nn.Module, Any]:
    """A model in eval mode, and the example inputs that came with it (None for a ``transformers`` model).

    Args:
        source: a hub id or a directory, or ``package.module:callable``.
        config_only: random weights; of a hub id or a directory, only the configuration is read.
        dtype: one of ``DTYPES``; "auto" takes the checkpoint's, or that of a callable's own model.
        seed: of random weights.

    Raises:
        InputError: there is no such model, or no weights of it.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    torch.manual_seed(seed)
    if is_callable(source) or config_only:
        model, inputs = load_model(source, device)
        config = getattr(model, "config", None) if is_pretrained(model) else None
        wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        return model.to(device=device, dtype=wanted).eval(), inputs
    import transformers

    cls: Any = model_class(hub_config(source), transformers.AutoModel)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with quiet("transformers"):
            loaded = cls.from_pretrained(source, dtype=kind, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load a model from {source!r} (with --config-only its weights are random): {first_line(error)}"
        ) from error
    return loaded.to(device).eval(), None


def inputs_for(model: nn.Module, given: Any, batch: int, length: int, seed: int = 0) -> Call:
    """Inputs of a model: those given, or random ones of a ``transformers`` model.

    Args:
        given: example inputs that came with the model, or None.
        batch: rows.
        length: tokens of a row, where the main input is token ids.

    Raises:
        InputError: there are none, and none can be made.
    """
    parameter = next(model.parameters())
    made = default_inputs(model) if given is None else given
    if made is None:
        raise InputError(
            f"no inputs can be made for {type(model).__name__}: name a callable that gives a model and its inputs"
        )
    generator = torch.Generator().manual_seed(seed)
    if given is None:
        hub: Any = model
        if hub.main_input_name == "input_ids":
            vocabulary = hub.get_input_embeddings().num_embeddings
            names = [name for name in made if name in ("input_ids", "decoder_input_ids")]
            made = {name: torch.randint(0, vocabulary, (batch, length), generator=generator) for name in names}
        else:
            made = tree_map_only(Tensor, lambda t: t[:1].repeat(batch, *[1] * (t.dim() - 1)), made)
    call = forward_call(made)
    if is_pretrained(model):
        call = (), keyword_inputs(model, call)
        if getattr(model.config, "use_cache", False):
            call[1].setdefault("use_cache", False)

    def fitted(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(parameter.device)
        return tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor

    found: Call = tree_map_only(Tensor, fitted, call)
    return found


def varied(call: Call, seed: int) -> dict[str, Any] | tuple[Any, ...]:
    """Other inputs of the same kind: ids in another order, numbers with noise; masks stay what they are.

    Returns:
        As example inputs are written; positional arguments first, where there are any.
    """
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            return tensor + noise.to(device=tensor.device, dtype=tensor.dtype)
        if tensor.dtype == torch.bool or tensor.numel() < 2:
            return tensor
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].reshape(tensor.shape)

    args, kwargs = call
    changed = {n: v if n.endswith("mask") else tree_map_only(Tensor, other, v) for n, v in kwargs.items()}
    return changed or tree_map_only(Tensor, other, args)
