"""Upload of a folder to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from config.errors import UserError, first_line


def push_folder(
    folder: Path, name: str, *, kind: Literal["dataset", "model"], again: str, files: Sequence[str] | None = None
) -> str:
    """Upload a folder as a private repository, and return its address.

    `again` names the command that retries, for the error message; `files` are names or patterns to upload (None: all).

    Raises:
        UserError: There is no login, no such name, or no network.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        patterns = None if files is None else list(files)
        api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"push_to_hub={name}: the upload failed ({first_line(error)}). Log in with `hf auth login`, and give "
            f"USER/NAME; the {kind} is complete in {folder}, and {again} tries again"
        ) from error
    return str(address)
