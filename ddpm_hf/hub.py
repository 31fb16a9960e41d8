"""Sharing a trained pipeline on the Hugging Face Hub."""

from importlib import metadata, resources
from pathlib import Path
from string import Template

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.progress import read_log
from ddpm_hf.training import Run

# What belongs into a model's repository. Checkpoints do not, and neither do the pictures that show images of the data,
# which may not be one's own to publish: data.png, forward.png, neighbours.png.
UPLOADED = ["README.md", "model_index.json", "unet/*", "scheduler/*", "log.csv", "train_config.json"]
UPLOADED += ["samples.png", "first_samples.png", "denoising.gif", "loss.png"]


def check_login(run: Run) -> None:
    """Before training: a ValueError if the upload at its end would fail for want of a login or of a right name."""
    validate_repo_id(_name(run))  # its error is a ValueError
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: each has an error of its own
        raise ValueError(f"push_to_hub needs a login (`hf auth login`): {error}") from error


def push_when_finished(run: Run) -> None:
    """After the last save: write the model card and upload the pipeline folder to `hub_model_id`.

    Raises:
        ValueError: the upload failed. The model is in `output_dir`, and the message says how to try again.
    """
    if not run.finished:
        return
    api = HfApi()
    try:
        repo_id = api.create_repo(_name(run), private=run.config.hub_private_repo, exist_ok=True).repo_id
        (run.output_dir / "README.md").write_text(model_card(run, repo_id))
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=run.output_dir,
            allow_patterns=UPLOADED,
            commit_message=f"Train for {run.step} updates",
        )
    except Exception as error:  # the Hub, its client, the network and the disk all raise their own
        raise ValueError(
            f"the model is trained and saved in {run.output_dir}, but its upload failed ({error}); the same command "
            "with --resume_from_checkpoint latest tries again"
        ) from error
    print(commit.commit_url, flush=True)


def _name(run: Run) -> str:
    return run.config.hub_model_id or Path(run.config.output_dir).name


def model_card(run: Run, repo_id: str) -> str:
    """The card of a finished run: what was done and measured, nothing else."""
    last, unet = read_log(run.output_dir / "log.csv")[-1], run.pipeline.unet
    channels, height, width = run.images.shape
    names, guidance = unet.config.get("class_names"), run.config.guidance_scale  # all that have classes have names
    packages = ("ddpm-hf", "torch", "diffusers", "accelerate")
    return Template(
        resources.files("ddpm_hf").joinpath("templates/model_card.md").read_text()
    ).substitute(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        data=Path(run.config.train_data_dir).name if run.config.train_data_dir else run.config.dataset_name,
        shape=f"{height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        num_images="a stream of them" if run.images.num_images is None else f"{run.images.num_images:,}",
        task="unconditional-image-generation" if names is None else "other",  # the Hub has no name for it
        call="batch_size=16" if names is None else f"class_labels={names[:4]}, guidance_scale={guidance:g}",
        classes="none" if names is None else f"{len(names)}: {', '.join(names)[:200]}",
        network=type(unet).__name__,
        parameters=f"{sum(p.numel() for p in unet.parameters()):,}",
        steps=f"{run.step:,}",
        images_seen=f"{int(last['images_seen']):,}",
        held_out_loss=f"{last['held_out_loss']:.4f}" if run.held_out else "not measured",
        num_held_out=len(run.held_out) if run.held_out else 0,
        versions=", ".join(f"{name} {metadata.version(name)}" for name in packages),
    )
