"""Which entries of a site's input are tokens of the batch, and which are padding."""

from __future__ import annotations

import torch

from passes.errors import InputError
from passes.ir.forward_context import Call
from passes.ir.torch_internals import tree_iter


class Tokens:
    """Matches inputs of sites to the rows, and to the attention masks, of a batch.

    Args:
        call: the batch, as positional and keyword arguments. Keywords that end with ``attention_mask`` are masks
            (batch, sequence), nonzero where there is a token.

    Raises:
        InputError: a mask has another number of dimensions, or a row of it no token.
    """

    def __init__(self, call: Call) -> None:
        tensors = [leaf for leaf in tree_iter(call) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        self.masks: list[torch.Tensor] = []
        for name, mask in call[1].items():
            plain = name.endswith("attention_mask") and not name.startswith(("global_", "pixel_"))
            if not plain or not isinstance(mask, torch.Tensor):
                continue
            if mask.dim() != 2:
                raise InputError(f"{name} must be (batch, sequence) to tell padding, found shape {tuple(mask.shape)}")
            mask = mask != 0
            if not mask.any(dim=1).all():
                raise InputError(f"row {int(mask.any(dim=1).int().argmin())} of {name} is all padding")
            self.masks.append(mask)
        ids = call[1].get("decoder_input_ids")
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and call[1].get("decoder_attention_mask") is None:
            self.masks.append(torch.ones_like(ids, dtype=torch.bool))  # so that the encoder's mask is not taken for it
        leading = (self.masks or tensors)[0].shape[0] if self.masks or tensors else 1
        many = (t.shape[0] for t in tensors if t.dim() > 1 and t.shape[0] != 1)
        self.rows = leading if self.masks else next(many, leading)
        self.padded = any(not bool(mask.all()) for mask in self.masks)

    def _mask(self, lead: tuple[int, ...]) -> torch.Tensor | None:
        """The mask that belongs to an input of leading sizes, in their shape.

        Raises:
            InputError: two masks of one shape differ, so that either may be meant.
        """
        found: list[torch.Tensor] = []
        for mask in self.masks:
            batch, sequence = mask.shape
            if lead[:2] == (batch, sequence):
                found.append(mask.reshape(batch, sequence, *[1] * (len(lead) - 2)).expand(lead))
            elif lead == (batch * sequence,):
                found.append(mask.flatten())
            elif lead[:2] == (sequence, batch):
                found.append(mask.T.reshape(sequence, batch, *[1] * (len(lead) - 2)).expand(lead))
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise InputError("two attention masks of the same shape differ: pad the two sides to unequal lengths")
        return found[0] if found else None

    def select(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The tokens (n, d_in) of an input (..., d_in) without padding, and whether padding could be told."""
        flat, lead = x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1])
        if not self.padded or lead == (self.rows,):
            return flat, True
        mask = self._mask(lead)
        return (flat, False) if mask is None else (flat[mask.flatten()], True)

    def pool(self, key: str, x: torch.Tensor, how: str) -> torch.Tensor:
        """One token per row, the "last" or the "mean", or "all" tokens, of an input (..., d_in): (n, d_in).

        Raises:
            InputError: the input's leading sizes are not those of the batch.
        """
        x, mask = self._by_row(key, x)
        if how == "all":
            return x[mask]
        if how == "mean":
            weights = mask.to(torch.promote_types(x.dtype, torch.float32))
            x = x.to(weights.dtype).masked_fill(~mask[:, :, None], 0.0)  # padding may hold anything
            return torch.einsum("bs,bsd->bd", weights / weights.sum(dim=1, keepdim=True), x)
        steps = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, steps, -1).max(dim=1).values
        return x[torch.arange(len(x), device=x.device), last]

    def _by_row(self, key: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input as (rows, tokens, d_in), and which of these are tokens."""
        lead, width = tuple(x.shape[:-1]), x.shape[-1]
        mask = self._mask(lead)
        if len(lead) > 1 and lead[0] != self.rows == lead[1]:  # the sequence stands first
            x, lead = x.transpose(0, 1), (lead[1], lead[0], *lead[2:])
            mask = None if mask is None else mask.transpose(0, 1)
        if not lead or lead[0] % self.rows:
            raise InputError(
                f"site {key!r}: its input of shape {tuple(x.shape)} is not made of the {self.rows} rows of the batch, "
                "so that tokens cannot be pooled by row; leave it out with exclude_modules"
            )
        x = x.reshape(self.rows, -1, width)
        if mask is None:
            return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return x, mask.reshape(x.shape[:2])
