"""A checkpoint's name to a folder: a local path as it is, a Hugging Face id through huggingface_hub's cache."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from .errors import RodimusError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Everything but weights: configs, tokenizers, an index, and what a model card is made from. Never code.
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*"]
_SAFETENSORS = "model*.safetensors"
_TORCH = "pytorch_model*.bin"


def find_folder(source: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded first if it is a Hugging Face id (``owner/name``).

    A folder that exists always wins; what only looks like a path never goes to the hub. Of the weights just one
    format is fetched: safetensors where the repository has them, PyTorch files otherwise. Files that are complete
    are not fetched again.

    Args:
        weights: False for the small files alone; weights that are in the cache are in the folder all the same.

    Raises:
        RodimusError: no such folder; or the download failed, and how to go on.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise RodimusError(f"{source} is a file; give the folder that holds it")
    if not HUB_ID.fullmatch(str(source)) or ".." in str(source):
        hint = "" if _is_path(str(source)) else " (a Hugging Face id has the form owner/name)"
        raise RodimusError(f"there is no folder {source}{hint}")
    return _download(str(source), revision, weights)


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "/" in source or "\\" in source


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        try:
            files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
        except Exception as error:
            if not _is_offline(error):
                raise
            return Path(snapshot_download(repo, revision=revision, allow_patterns=_SMALL_FILES, local_files_only=True))
        kind = _SAFETENSORS if any("/" not in file and Path(file).match(_SAFETENSORS) for file in files) else _TORCH
        wanted = [*_SMALL_FILES, kind] if weights else _SMALL_FILES
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise RodimusError(_explain(error, repo, revision)) from error


def _is_offline(error: Exception) -> bool:
    """Whether the hub was not reached at all (as opposed to: it answered with an error)."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return False
    # The HTTP client differs between versions of huggingface_hub (requests, httpx, ...); its errors' names do not.
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, ConnectionError | LocalEntryNotFoundError | TimeoutError) or bool(
        names & {"OfflineModeIsEnabled", "ConnectError", "TimeoutException", "ConnectionError"}
    )


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """One line: what went wrong with this download, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its licence at {page}, then run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no folder {repo} here, and no model {repo} at {constants.ENDPOINT} "
            "(if it is private, run `hf auth login`)"
        )
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        need = "it does not exist, or needs `hf auth login` with a token that may read it"
        return f"{page} refuses access ({status}): {need}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full: free some space, or set HF_HOME to a larger one, "
            f"and run this again to go on with {repo}"
        )
    if _is_offline(error):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"there is no folder {repo} here, {offline}, and {repo} is not in {constants.HF_HUB_CACHE}"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"downloading {repo} failed ({reason}): run this again to go on, finished files are kept"
