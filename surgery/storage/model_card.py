"""The model card of an adapter, ``README.md``: what it is for, its sizes, and how to load it.

A card ends with a comment that holds the digest of the text above it. That is how a card that this package wrote is
told from a page that somebody wrote or edited.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from surgery.storage.adapter_config import LIBRARY
from surgery.support.untrusted_files import JsonObject, read_limited

CARD = "README.md"
MARKER = "<!-- written by save_adapter; an edited page is never replaced; sha256:{} -->\n"
LIMIT = 2**20


def card(config: JsonObject, model_class: str, hub_class: bool, trained: int) -> bytes:
    """The text of a card.

    Args:
        config: the configuration of the adapter.
        model_class: name of the base model's class.
        hub_class: whether ``transformers`` has that class.
        trained: number of trainable numbers.
    """
    from huggingface_hub import ModelCardData

    base = config["base_model_name_or_path"]
    head = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=LIBRARY,
        tags=["sspace", config["variant"]],
    ).to_yaml()
    sites = config["sites"].values()
    ranks = sorted({site["r"] for site in sites})
    variants = sorted({site.get("variant", config["variant"]) for site in sites})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    model = f"...  # the {model_class} that the adapter was made for"
    if hub_class:
        model = f'transformers.{model_class}.from_pretrained("{base or "the base model"}")'
    text = "\n".join(
        [
            "---",
            head,
            "---",
            f"# S-space adapter{f' for {base}' if base else ''}",
            "",
            f"{', '.join(variants)}: {len(sites)} sites, rank {rank}, {trained:,} trainable numbers.",
            "",
            "```python",
            "import surgery, transformers" if hub_class else "import surgery",
            f"model = {model}",
            'surgery.load_adapter(model, "path/of/this/folder")',
            "```",
            "",
        ]
    )
    return (text + MARKER.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def may_write(folder: Path) -> bool:
    """Whether the card of a folder may be written: there is none, or one that this package wrote and nobody edited."""
    try:
        page = read_limited(folder / CARD, LIMIT)
    except FileNotFoundError:
        return not (folder / CARD).is_symlink()
    except (OSError, ValueError):  # something else of that name
        return False
    text, digest = page[: page.rfind(b"<!-- ")], re.search(rb"sha256:([0-9a-f]{64}) -->\n$", page)
    return digest is not None and hashlib.sha256(text).hexdigest().encode() == digest[1]
