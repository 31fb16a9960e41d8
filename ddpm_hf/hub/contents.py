"""The files that a push uploads from a pipeline folder."""

import json
import re
from pathlib import Path, PureWindowsPath

from huggingface_hub import ModelCard

from ddpm_hf.hub.cards import CARD, EVALUATION, FACTS, PICTURES, evaluation_of, is_generated, model_card, read_facts
from ddpm_hf.hub.self_contained import code_of
from ddpm_hf.pipelines.loading import INDEX, check_inside, is_hub_id, root_of
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.utils.arguments import NOT_FINITE, parse_json, read_json

CONFIG = "train_config.json"
# Checkpoints are left out. So are pictures that show images of the data, which the user may have no right to publish:
# data.png, forward.png, neighbours.png and the evaluation report.
MODEL = [INDEX, "unet/config.json", "unet/*.safetensors", "unet/*.safetensors.index*.json", "scheduler/*_config.json"]
UPLOADED = [*MODEL, CARD, FACTS, CONFIG, EVALUATION, "log.csv", *PICTURES]
Files = dict[str, Path | bytes | ModelCard]  # by name in the repository: a local file, its content, or a new model card


def files_of(
    folder: Path,
    pipeline: DDPMCustomPipeline,
    repo_id: str,
    license: str | None = None,
    self_contained: bool = False,
) -> Files:
    """Everything that is uploaded from a pipeline folder.

    Raises:
        ValueError: a file is a link out of the folder, is invalid, or is not UTF-8.
    """
    files = files_in(folder)
    if not evaluation_of(pipeline, folder):  # missing, or measured on other weights
        files.pop(EVALUATION, None)
    files |= code_of(folder) if self_contained else {}
    files |= {name: _without_paths(name, content) for name, content in files.items()
              if name.endswith(".json") and ".safetensors.index" not in name}  # fmt: skip
    if is_generated(folder / CARD):
        files[CARD] = model_card(pipeline, read_facts(folder / FACTS), folder, repo_id, license, self_contained)
        return files
    try:
        files[CARD].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{files[CARD]} must be UTF-8: {error}") from error
    return files


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a pipeline folder that match `UPLOADED`, by name in the repository."""
    found = {path.relative_to(folder).as_posix(): path for pattern in UPLOADED for path in sorted(folder.glob(pattern))}
    for path in found.values():
        check_inside(path, root_of(folder))  # a link could lead to a private file
    return found


def _without_paths(name: str, content: Path | bytes) -> bytes:
    """A JSON file in which local paths of data or weights are cut to their last part."""
    settings = (read_json if isinstance(content, Path) else parse_json)(content, constants=NOT_FINITE)
    settings.pop("_name_or_path", None)
    for key, value in settings.items() if name == CONFIG else ():
        may_be_id = key in ("dataset_name", "pretrained_model_name_or_path", "hub_model_id")
        if isinstance(value, str) and re.search(r"[/\\]", value) and not (may_be_id and is_hub_id(value)):
            settings[key] = PureWindowsPath(value).name  # splits at slashes and backslashes
    return (json.dumps(settings, indent=2) + "\n").encode()
