"""Sharing a trained pipeline on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from ddpm_hf.training import Run

# What belongs into a model's repository; checkpoints do not.
UPLOADED = ("model_index.json", "unet/*", "scheduler/*", "*.png", "*.gif", "log.csv", "train_config.json")


def check_login(run: Run) -> None:
    """Before training: a ValueError if the upload at its end would fail for want of a login."""
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"push_to_hub needs a login (`hf auth login`): {' '.join(str(error).split())}") from error


def push_when_finished(run: Run) -> None:
    """After the last save: upload the pipeline folder to `hub_model_id`."""
    if not run.finished:
        return
    api = HfApi()
    repo = api.create_repo(
        run.config.hub_model_id or Path(run.config.output_dir).name, private=run.config.hub_private_repo, exist_ok=True
    )
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=run.output_dir,
        allow_patterns=list(UPLOADED),
        commit_message=f"Train for {run.step} updates",
    )
