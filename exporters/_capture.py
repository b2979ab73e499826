"""What the exporters share about a model's outputs: their names, and the positions that mean something."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path


def output_names(output: Any) -> list[str]:
    """Names of the output's tensors: the keys of a mapping, positions of a sequence, "output" for a single tensor."""
    leaves, _ = tree_flatten_with_path(output)
    if len(leaves) == 1 and not leaves[0][0]:
        return ["output"]
    parts = [[str(getattr(key, "key", getattr(key, "idx", key))) for key in path] for path, _ in leaves]
    return ["_".join(["output", *part] if part[0].isdigit() else part) for part in parts]


def valid_positions(output: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Leave out the positions of padding, which attend to nothing: each runtime fills them as it likes."""
    valid = torch.ones(output.shape[:2], dtype=torch.bool)
    for name, mask in inputs.items():
        if name.endswith("attention_mask") and mask is not None and mask.shape == output.shape[:2]:
            valid &= mask.cpu().bool()
    return output if valid.all() else output[valid]
