"""The finished adapter on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from lora_dpo.errors import LoraDpoError, UserError


def require_access(repo: str) -> None:
    """Before hours of work: a well-formed name and a token.

    Raises:
        UserError: either is missing.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository ({error})", hint="give OWNER/NAME") from None
    if huggingface_hub.get_token() is None:
        raise UserError(
            "pushing to the hub needs a token, and there is none",
            where="--push-to-hub",
            hint="run `hf auth login`, or set HF_TOKEN; or push later, with the same command",
        )


def push(run_dir: Path, repo: str, files: list[str]) -> str:
    """Uploads `files` (paths below `run_dir`, those that exist; the adapter's lies flat in the repository).

    Returns:
        The repository's address.

    Raises:
        LoraDpoError: refused or unreachable; the run is untouched.
    """
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repo, exist_ok=True)
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=_place(name), path_or_fileobj=run_dir / name)
            for name in files
            if (run_dir / name).is_file()
        ]
        api.create_commit(repo, operations, commit_message="Upload a LoRA adapter trained with lora-dpo")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LoraDpoError(
            f"the adapter is finished in {run_dir}, but pushing it to {repo} failed: {reason}\n"
            "  → run the same command again: it only pushes"
        ) from error
    return str(address)


def _place(name: str) -> str:
    return name.removeprefix("adapter/")
