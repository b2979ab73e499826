"""What the exporters share about a model's outputs: their names, and the positions that mean something."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from passes.ir.torch_internals import tree_flatten_with_path


def output_names(output: object) -> list[str]:
    """Names of the output's tensors: the keys of a mapping, positions of a sequence, "output" for a single tensor."""
    leaves, _ = tree_flatten_with_path(output)
    if len(leaves) == 1 and not leaves[0][0]:
        return ["output"]
    parts = [[str(getattr(key, "key", getattr(key, "idx", key))) for key in path] for path, _ in leaves]
    return ["_".join(["output", *part] if part[0].isdigit() else part) for part in parts]


def valid_positions(output: torch.Tensor, inputs: Mapping[str, object]) -> torch.Tensor:
    """Leave out the positions of padding, which attend to nothing: each runtime fills them as it likes.

    Positions are dimension 1, or 2 of what is kept of each head. A mask may also cover a past that the output lacks.
    """
    named = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    masks = [mask.cpu().bool() for name, mask in named.items() if name.endswith("attention_mask")]
    ids = named.get("input_ids")
    queries = ids.shape[1] if ids is not None else None
    for dim in (2, 1) if output.dim() == 4 else (1,) if output.dim() > 1 else ():
        rows, length = output.shape[0], output.shape[dim]
        fitting = [m for m in masks if m.dim() == 2 and len(m) == rows and length in (m.shape[1], queries)]
        parts = [m[:, m.shape[1] - length :] for m in fitting if m.shape[1] >= length]
        if parts:
            kept = torch.stack(parts).all(dim=0)
            return output if kept.all() else output.transpose(1, dim)[kept]
    return output
