"""A converted folder to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.hub import HUB_ID


def check_upload(repo: str) -> None:
    """Refuse, before a long run, an upload that cannot work.

    Raises:
        RodimusError: ``repo`` has not the form owner/name, there is no valid token, or the owner is someone else.
    """
    from huggingface_hub import HfApi

    if not HUB_ID.fullmatch(repo):
        raise RodimusError(f"a repository to upload to has the form owner/name, not {repo!r}")
    try:
        me = HfApi().whoami()
    except Exception as error:  # the client's errors are of many kinds
        raise RodimusError(_explain(error, repo)) from error
    owners = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
    owner = repo.split("/")[0]
    if owner not in owners:
        raise RodimusError(f"{repo}: the token is for {', '.join(owners)}, who cannot write to {owner}'s repositories")


def upload(folder: str | Path, repo: str) -> str:
    """Put a folder's files in a model repository, made if there is none; returns its address.

    Raises:
        RodimusError: it did not work; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model converted by rodimus-mlx")
    except Exception as error:
        again = f"{folder} is complete: `hf upload {repo} {folder}` tries again"
        raise RodimusError(f"{_explain(error, repo)}; {again}") from error
    return str(address)


def _explain(error: Exception, repo: str) -> str:
    """One line: what went wrong, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalTokenNotFoundError):
        return "uploading needs a Hugging Face token that may write: run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} cannot be uploaded: HF_HUB_OFFLINE is set"
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hugging Face token is not valid (any more): run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the Hugging Face token may not write to {repo}: make one that may, and run `hf auth login`"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"uploading to {repo} at {constants.ENDPOINT} failed ({reason})"
