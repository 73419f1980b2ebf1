"""Upload a written checkpoint to the hub as it is."""

from pathlib import Path

from msmoe.checkpoint.source import first_line, is_connection_error
from msmoe.errors import UserError


def check_upload(repository: str) -> None:
    """Check, before any work, that a repository can be pushed to.

    Raises:
        UserError: for a name that is none, offline mode, or without a token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository!r} is no repository: give OWNER/NAME ({error})") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push needs the hub, and HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UserError("--push needs a token: `hf auth login`, or set HF_TOKEN")


def upload(folder: str | Path, repository: str) -> str:
    """Create a repository where there is none, and upload every file of a checkpoint folder.

    Returns:
        address of the commit.

    Raises:
        UserError: if the hub refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a checkpoint written by msmoe"
        )
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError) and not is_connection_error(error):
            raise
        raise UserError(
            f"the hub did not take {folder}, which is complete: {first_line(error)}; `hf upload {repository} {folder}` "
            "tries again"
        ) from error
    return str(commit.commit_url)
