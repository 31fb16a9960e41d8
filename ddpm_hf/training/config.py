"""`TrainConfig`: every setting of a run; from flags, from recipes, and back to a file that can be run again."""

import dataclasses
import difflib
import functools
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ddpm_hf.data.config import (
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    EMBEDDED_DIGITS,
    POSITIVE,
    DataConfig,
    one_of,
    setting,
)
from ddpm_hf.schedulers.noise import PREDICTION_TYPES
from ddpm_hf.utils import files
from ddpm_hf.utils.yaml_files import read_yaml

RECIPES = resources.files("ddpm_hf") / "recipes"
HEADINGS = ("run", "data", "model", "optimisation", "saving and previews")  # of `--help`, in this order
_run, _data, _model, _optimisation, _saving = (functools.partial(setting, heading) for heading in HEADINGS)


@dataclass
class TrainConfig(DataConfig):
    """The one schema: a field is a flag of the same name, a key of a recipe and a key of `train_config.json`.

    What diffusers' `train_unconditional.py` has too bears the name that it has there. Steps are optimiser updates.
    A wrong value is a ValueError that says what would be right.
    """

    config: str = _run(
        "recipe: a packaged one by its name (`ddpm-hf recipes` lists them), or the path of a YAML or JSON file; "
        "default: digits, or with --train_data_dir or --dataset_name the recipe for images of their size",
        "digits",
    )
    output_dir: str | None = _run(
        "where everything is written; default: runs/<recipe>, or runs/<name of the data> for data of your own"
    )
    overwrite_output_dir: bool = _run("start afresh in a folder that holds an unfinished run", False)
    random_flip: bool = _data("flip each image left to right with probability 1/2", False)
    class_conditional: bool = _data(
        "condition the network on classes: those of the ClassLabel column, or one folder for each class", False
    )
    label_dropout: float = _data(
        "drop the class label of this share of the images, as classifier-free guidance needs", 0.1, BELOW_1
    )
    data_license: str | None = _data("licence of the images, for the model card; default: what the data set says")
    pretrained_model_name_or_path: str | None = _model(
        "start from this pipeline's network and scheduler (a folder or a Hub id) in place of the recipe's"
    )
    unet: dict | str | None = _model("arguments of DDPMUNet as JSON; they are added to the recipe's", {})
    scheduler: dict | str | None = _model(
        "arguments of LinearNoiseScheduler, or with beta_schedule squaredcos_cap_v2 of CosineNoiseScheduler, as JSON; "
        "they are added to the recipe's",
        {},
    )
    prediction_type: str | None = _model(
        "what the network predicts: epsilon, sample or v_prediction; default: as scheduler says, or epsilon",
        rule=one_of(*PREDICTION_TYPES),
    )
    learned_variance: bool = _model(
        "learn the variance of the reverse process too (Improved DDPM), for bits/dim and for few steps", False
    )
    train_batch_size: int = _optimisation("images a process and a micro-batch", 64, AT_LEAST_1)
    gradient_accumulation_steps: int = _optimisation("micro-batches an update", 1, AT_LEAST_1)
    max_train_steps: int | None = _optimisation("updates; takes the place of num_epochs", rule=AT_LEAST_1)
    num_epochs: int = _optimisation("passes over the data", 100, AT_LEAST_1)
    learning_rate: float = _optimisation("peak learning rate of AdamW", 1e-4, POSITIVE)
    lr_scheduler: str = _optimisation(
        "after the warm-up: constant, or cosine or linear to 0", "constant", one_of("constant", "cosine", "linear")
    )
    lr_warmup_steps: int = _optimisation("updates of linear warm-up", 500, AT_LEAST_0)
    adam_beta1: float = _optimisation("AdamW: decay of the mean", 0.9, BELOW_1)
    adam_beta2: float = _optimisation("AdamW: decay of the mean square", 0.999, BELOW_1)
    adam_weight_decay: float = _optimisation("AdamW: weight decay", 0.0, AT_LEAST_0)
    adam_epsilon: float = _optimisation("AdamW: epsilon", 1e-8, POSITIVE)
    max_grad_norm: float = _optimisation("clip the norm of the gradient to this", 1.0, POSITIVE)
    ema_max_decay: float = _optimisation(
        "decay of the moving average of the weights, which warms up to it", 0.9999, BELOW_1
    )
    snr_gamma: float | None = _optimisation(
        "weight the loss by min-SNR-gamma with this gamma; the paper's is 5", rule=POSITIVE
    )
    antithetic_timesteps: bool = _optimisation(
        "spread the timesteps of an update evenly, from one random offset, in place of drawing each", False
    )
    gradient_checkpointing: bool = _optimisation(
        "keep few activations and compute them anew in the backward: less memory, more time, the same gradients", False
    )
    compile: bool = _optimisation(
        "torch.compile the network, which is meant for CUDA; the first update takes minutes", False
    )
    mixed_precision: str | None = _optimisation(
        "no, bf16, or fp16 (CUDA only); default: as `accelerate launch` says, or no", rule=one_of("no", "bf16", "fp16")
    )
    checkpointing_steps: int = _saving(
        "save, measure the held-out loss and draw samples every so many updates", 1000, AT_LEAST_1
    )
    checkpoints_total_limit: int = _saving("checkpoints to keep", 2, AT_LEAST_1)
    resume_from_checkpoint: str | None = _saving("`latest`, or the folder of a checkpoint")
    eval_batch_size: int = _saving("images in the grid of samples; of classes at least one each", 64, AT_LEAST_1)
    ddpm_num_inference_steps: int = _saving("steps in which they are sampled", 50, AT_LEAST_1)
    guidance_scale: float = _saving("classifier-free guidance of the samples of classes; 1: none", 1.0, AT_LEAST_0)
    preview_time_share: float = _saving(
        "part of the training time that previews may take; the last is always drawn", 0.05, BELOW_1
    )
    logger: str | None = _saving(
        "tensorboard, wandb or trackio, beside log.csv", rule=one_of("tensorboard", "wandb", "trackio")
    )
    push_to_hub: bool = _saving("upload the pipeline at each save, in the background, and at the end", False)
    hub_model_id: str | None = _saving("<user>/<name> of the repository; default: the name of output_dir")
    hub_private_repo: bool = _saving("make the repository private", False)

    def __post_init__(self):
        for name in ("unet", "scheduler"):
            setattr(self, name, _as_dict(name, getattr(self, name)))
        if self.mixed_precision is False:
            self.mixed_precision = "no"  # as YAML reads it
        super().__post_init__()
        if self.output_dir is None:
            data = self.train_data_dir or self.dataset_name
            name = Path(os.path.abspath(data)).name if data else ""  # of the folder that `.` and `photos/` mean
            self.output_dir = str(Path("runs", name or Path(self.config).stem))
        self._check("streaming", not self.streaming or self.max_train_steps is not None, "needs max_train_steps")
        guided = self.guidance_scale != 1
        self._check("guidance_scale", self.class_conditional or not guided, "needs class_conditional")
        self._check("label_dropout", self.label_dropout or not guided, "must be greater than 0 for guidance_scale")
        both = self.unet and self.pretrained_model_name_or_path is not None
        self._check("unet", not both, "must be empty: the network comes with the weights")
        also = self.scheduler.get("prediction_type", self.prediction_type)
        same = self.prediction_type in (None, also)
        self._check("prediction_type", same, f"and scheduler has the prediction_type {also!r}: give one of them")

    def save(self, path) -> None:
        """As JSON that runs again as it stands: from the beginning, however this run came to be."""
        again = dataclasses.replace(self, resume_from_checkpoint=None, overwrite_output_dir=False)
        files.write(path, json.dumps(dataclasses.asdict(again), indent=2) + "\n")


def recipe_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir())


def recipe_text(name: str) -> str:
    """The YAML file of a packaged recipe; its first line is a comment that says what the recipe is for."""
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str) -> dict:
    """Settings of a packaged recipe or of a YAML or JSON file, as a dict of some of `TrainConfig`'s fields."""
    names = recipe_names()
    if name_or_path not in names and not Path(name_or_path).is_file():
        raise ValueError(f"config={name_or_path!r} is neither a file nor one of the recipes {', '.join(names)}")
    recipe = read_yaml(RECIPES / f"{name_or_path}.yaml" if name_or_path in names else name_or_path, "config")
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for key in recipe:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"config={name_or_path!r}: there is no setting {key!r}{hint}")
    return {"config": name_or_path, **recipe}


def resolve(flags: dict) -> TrainConfig:
    """The configuration that these settings make on top of the recipe that `flags["config"]` names.

    The recipe is `digits` if it names none, whatever the data: `recipe_choice` chooses by the size of the images.
    """
    recipe = load_recipe(flags.get("config", "digits"))
    if "pretrained_model_name_or_path" in flags:
        recipe.update(unet={}, scheduler={}, prediction_type=None)  # they come with the weights
    if "num_epochs" in flags:
        recipe.pop("max_train_steps", None)  # which would take its place
    merged = {**recipe, **flags, "config": recipe["config"]}
    for name in ("unet", "scheduler"):
        recipes, flag = _as_dict(name, recipe.get(name)), _as_dict(name, flags.get(name))
        if "beta_schedule" in flag:  # the recipe's ends are those of its own schedule
            recipes = {key: value for key, value in recipes.items() if key not in ("beta_start", "beta_end")}
        merged[name] = {**recipes, **flag}
    own = {"train_data_dir": None, "dataset_name": EMBEDDED_DIGITS, **recipe}  # the data of the recipe itself
    trains_on_own = all(flags.get(name, own[name]) == own[name] for name in ("train_data_dir", "dataset_name"))
    if merged.get("output_dir") is None and trains_on_own:
        merged["output_dir"] = str(Path("runs", Path(str(recipe["config"])).stem))  # many recipes have the same data
    return TrainConfig(**merged)


def _as_dict(name, value) -> dict:
    """Arguments of a class: a dict, JSON of one, or None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON: {error}") from error
    if not isinstance(value, dict | None):
        raise ValueError(f"{name}={value!r} must be names and values, such as '{{\"dropout\": 0.1}}'")
    return value or {}
