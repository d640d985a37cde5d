"""An exported folder on the Hugging Face hub, by whom this machine is logged in as."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cosmos_ssl import __version__
from cosmos_ssl.errors import UserError, listed
from cosmos_ssl.interop.hub import reason, status_of


def check_account(repository: str) -> None:
    """Raise UserError where nobody is logged in to the hub who may write ``ORG/NAME``, before there is much work."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"--push {repository}: nobody is logged in to the hub. Run: hf auth login (or set HF_TOKEN)")
    try:
        account = _api().whoami()
    except Exception as error:  # the hub's client raises its own errors, its HTTP library's, and OSError
        raise _failure(repository, error) from error
    mine = [account.get("name", ""), *(each.get("name", "") for each in account.get("orgs") or ())]
    if (place := repository.partition("/")[0]) not in mine:
        raise UserError(f"--push {repository}: the account has no place '{place}' on the hub. It has {listed(mine)}")


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder as a commit on ``ORG/NAME``, which is made where it is not there; returns its address.

    Raises UserError: also for a repository that all can see, where it should be ``private``.
    """
    api = _api()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        seen = private and not api.model_info(repository).private
        if not seen:
            words = f"Export of {folder.absolute().name} by cosmos_ssl {__version__}"
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=words)
    except Exception as error:
        raise _failure(repository, error) from error
    if seen:
        raise UserError(
            f"--push {repository}: it is there and public. Make it private on the hub, or leave --private out"
        )
    return f"{api.endpoint}/{repository}"


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _failure(repository: str, error: Exception) -> UserError:
    """One line for what the hub, or the way to it, refuses."""
    told = getattr(error, "server_message", None) or reason(error)
    match status_of(error):
        case 401:
            why = "the hub does not know this token. Run: hf auth login (or set another HF_TOKEN)"
        case 403 | 404:
            why = f"the account may not write there: {told}"
        case None:
            why = f"the hub cannot be reached: {told}"
        case status:
            why = f"the hub refuses it ({status}): {told}"
    return UserError(f"--push {repository}: {why}")
