"""A Space on the Hugging Face Hub with the page of `ddpm-hf demo`, to try a model in the browser."""

import json
from importlib import metadata

from huggingface_hub.utils import validate_repo_id

import ddpm_hf
from ddpm_hf.hub.push import check_right_to_push, upload


def push_space(repo_id: str, private: bool = False) -> str:
    """Upload a Space of the model's name, and return its commit's address.

    Files of an earlier push that somebody has changed on the Hub stay as they are.
    """
    repo_id = check_right_to_push(repo_id, private, repo_type="space")
    files = {name: text.encode() for name, text in space_files(repo_id).items()}
    return upload(files, repo_id, "Show a DDPM", "the same command", private, repo_type="space")


def space_files(repo_id: str) -> dict[str, str]:
    """The files, by name, of a Space that shows the model `repo_id`."""
    validate_repo_id(repo_id)  # its error is a ValueError
    try:
        gradio = metadata.version("gradio")
    except ImportError as error:
        raise ValueError("a Space needs the version of gradio, `pip install ddpm-hf[demo]`") from error
    card = {"title": repo_id.split("/")[-1], "sdk": "gradio", "sdk_version": gradio, "app_file": "app.py"}
    card["models"] = [repo_id]
    return {
        "app.py": (
            "from ddpm_hf import DDPMCustomPipeline\n"
            "from ddpm_hf.commands.page import LAUNCH, build_demo\n\n"
            f"pipeline = DDPMCustomPipeline.from_pretrained({repo_id!r})\n"
            "build_demo(pipeline).launch(**LAUNCH)\n"
        ),
        "requirements.txt": f"ddpm-hf[demo]=={ddpm_hf.__version__}\n",
        "README.md": "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in card.items()) + "---\n",
    }
