"""A Space on the Hugging Face Hub that serves the page of `ddpm-hf demo` for one model."""

import json
from importlib import metadata

from huggingface_hub.utils import validate_repo_id

import ddpm_hf
from ddpm_hf.hub.push import check_right_to_push
from ddpm_hf.hub.upload import upload


def push_space(repo_id: str, private: bool = False) -> str:
    """Upload a Space with the name of the model, and return the address of its commit.

    Files of an earlier push that were edited on the Hub are kept.
    """
    repo_id = check_right_to_push(repo_id, private, repo_type="space")
    files = {name: text.encode() for name, text in space_files(repo_id).items()}
    return upload(files, repo_id, "Show a DDPM", "run the same command to try again", private, repo_type="space")


def space_files(repo_id: str) -> dict[str, str]:
    """The files of a Space for the model `repo_id`, by name."""
    validate_repo_id(repo_id)  # raises a ValueError
    try:
        gradio = metadata.version("gradio")
    except ImportError as error:
        raise ValueError("a Space needs gradio; install it with `pip install ddpm-hf[demo]`") from error
    card = {"title": repo_id.split("/")[-1], "sdk": "gradio", "sdk_version": gradio, "app_file": "app.py"}
    card["models"] = [repo_id]
    return {
        "app.py": (
            "from ddpm_hf import DDPMCustomPipeline\n"
            "from ddpm_hf.commands.demo_page import build_demo, launch\n\n"
            f"pipeline = DDPMCustomPipeline.from_pretrained({repo_id!r})\n"
            "launch(build_demo(pipeline))\n"
        ),
        "requirements.txt": f"ddpm-hf[demo]=={ddpm_hf.__version__}\n",
        "README.md": "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in card.items()) + "---\n",
    }
