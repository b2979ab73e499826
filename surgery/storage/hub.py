"""Adapters on the Hugging Face Hub: sent and fetched when asked, and never otherwise."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from surgery.errors import AdapterError
from surgery.storage.adapter_file import CONFIG, TENSORS, open_adapter
from surgery.storage.model_card import CARD
from surgery.support.hf_config import first_line
from surgery.support.untrusted_files import naming, path_of

FILES = [CONFIG, TENSORS]


def push_adapter(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload S-space adapter",
) -> str:
    """Send an adapter directory to a repository of the Hub, which is made if it is not there.

    The adapter, its mirror, and a README.md if the directory has one, go in one commit; nothing else is sent.

    Args:
        path: what ``save_adapter`` wrote; it is checked first.
        repo_id: "owner/name".
        private: whether a new repository is private; None for the owner's default.
        revision: branch, "main" if None.
        token: access token; the one that is stored on this machine if None.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        AdapterError: the adapter is damaged, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    path = path_of(path, AdapterError)
    check_adapter(path)
    try:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        patterns = [*FILES, CARD]
        done = api.upload_folder(
            repo_id=repo_id, folder_path=path, allow_patterns=patterns, commit_message=message, revision=revision
        )
    except _failures() as error:
        raise AdapterError(
            f"cannot send {str(path)!r} to {repo_id!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return str(done.commit_url)


def pull_adapter(
    repo_id: str, path: str | os.PathLike[str] | None = None, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch an adapter from the Hub.

    Args:
        repo_id: "owner/name".
        path: a directory that is new or empty; the Hub's cache on this machine if None.
        revision: branch, tag or commit; name a commit to be sure what is loaded.
        token: access token; the one that is stored on this machine if None.

    Returns:
        The directory, for ``load_adapter``.

    Raises:
        AdapterError: the repository has no adapter or a damaged one, or the Hub refuses or cannot be reached; nothing
            is written to the path.
    """
    from huggingface_hub import snapshot_download

    if revision is not None and not isinstance(revision, str):
        raise AdapterError(f"revision must be a text, found {revision!r:.80}")
    target = None if path is None else path_of(path, AdapterError)
    try:
        if target is not None and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
            raise AdapterError(f"{str(target)!r} must be a new or empty directory")
        # a directory that is there may be one that cannot be replaced, as the working directory
        place = target if target is None or target.is_dir() else target.parent
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".pull.") as temporary:
            staging = None if target is None else Path(temporary) / "adapter"
            fetched = Path(
                snapshot_download(repo_id, revision=revision, token=token, allow_patterns=FILES, local_dir=staging)
            )
            with naming(fetched, fetched if target is None else target):
                check_adapter(fetched)
            if target is None or staging is None:
                return fetched
            shutil.rmtree(staging / ".cache", ignore_errors=True)  # what the download notes for itself
            if target.is_dir():
                for name in (TENSORS, CONFIG):  # an adapter of format 2 is none before its configuration is there
                    if (staging / name).exists():
                        os.replace(staging / name, target / name)
            else:
                os.rename(staging, target)
            return target
    except _failures() as error:
        raise AdapterError(f"cannot fetch {repo_id!r}: {first_line(error)}") from error


def check_adapter(path: Path) -> None:
    """Check an adapter by itself, without a model.

    Raises:
        AdapterError: it is missing or damaged.
    """
    with open_adapter(path) as file, file.opened():
        pass


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    client = getattr(errors, "HTTPError", errors.HfHubHTTPError)  # of the library that it speaks HTTP with
    return (errors.HFValidationError, client, OSError)
