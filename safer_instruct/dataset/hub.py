"""Upload of a merged dataset to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from config.errors import UserError
from safer_instruct.dataset.files import ARROW

ALWAYS = ("README.md", "report.json", "funnel.svg")


def push_dataset(output: Path, name: str, files: Sequence[str]) -> str:
    """Upload dataset, card and report as a private dataset repository; returns its address.

    The ledgers stay here, and so does the arrow folder: it has the same rows once more.

    Raises:
        UserError: No login, no such name, or no network. The dataset is complete on the disk in any case.
    """
    api = huggingface_hub.HfApi()
    wanted = [*(file for file in files if file != ARROW), *ALWAYS]
    try:
        address = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="dataset", folder_path=output, allow_patterns=wanted)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"push_to_hub={name}: the upload failed ({reason}). Log in with `hf auth login`, and give USER/NAME; the "
            f"dataset is complete in {output}, and stage=merge tries again"
        ) from error
    return str(address)
