"""`TrainConfig`: every setting of a run; from flags, from recipes, and back to a file that can be run again."""

import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ddpm_hf import files
from ddpm_hf.scheduler import PREDICTION_TYPES

EMBEDDED_DIGITS = "digits"


def _setting(help, default=None):
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """The one schema: a field is a flag of the same name, a key of a recipe and a key of `train_config.json`.

    What diffusers' `train_unconditional.py` has too bears the name that it has there. Steps are optimiser updates.
    A wrong value is a ValueError that says what would be right.
    """

    config: str = _setting(
        "recipe: a packaged one by its name (`ddpm-hf recipes` lists them), or the path of a YAML or JSON file; "
        "default: digits, or with --train_data_dir or --dataset_name the recipe for images of their size",
        "digits",
    )
    output_dir: str | None = _setting(
        "where everything is written; default: runs/<recipe>, or runs/<name of the data> for data of your own"
    )
    overwrite_output_dir: bool = _setting("start afresh in a folder that holds an unfinished run", False)
    # data
    dataset_name: str | None = _setting(
        "`digits`, the 1,797 real 8x8 digits that come with scikit-learn, or a data set of the Hub", EMBEDDED_DIGITS
    )
    dataset_config_name: str | None = _setting("configuration of the data set of the Hub")
    train_data_dir: str | None = _setting(
        "in place of dataset_name: a folder of images, or one that holds train*.parquet (test*.parquet is held out)"
    )
    resolution: int | None = _setting("scale the shorter side to this and crop the middle; default: as they are")
    channels: int | None = _setting(
        "1 gray, 2 with alpha, 3 RGB, 4 RGBA, or as many as arrays have; default: as the first"
    )
    value_range: list[float] | None = _setting("values of black and white in images of more than 8 bits; needed there")
    background: list[float] | None = _setting(
        "what to put under transparent images: 0 (black) ... 1 (white), one number or one a colour"
    )
    max_bad_fraction: float = _setting("stop if more than this part of the images can't be read", 0.01)
    streaming: bool = _setting(
        "read a data set of the Hub, or train*.parquet, while training, and keep none of it", False
    )
    dataloader_num_workers: int = _setting("processes that decode the images; 0: the training process", 0)
    random_flip: bool = _setting("mirror each image left to right with probability 1/2", False)
    class_conditional: bool = _setting(
        "learn the classes too: those of the ClassLabel column, or a folder a class", False
    )
    label_dropout: float = _setting("hide the class of this part of the images, which guidance needs", 0.1)
    data_license: str | None = _setting("licence of the images, for the model card; default: what the data set says")
    # model
    pretrained_model_name_or_path: str | None = _setting(
        "start from this pipeline's network and scheduler (a folder or a Hub id) in place of the recipe's"
    )
    unet: dict | str | None = _setting("arguments of DDPMUNet as JSON; they are added to the recipe's", {})
    scheduler: dict | str | None = _setting(
        "arguments of LinearNoiseScheduler, or with beta_schedule squaredcos_cap_v2 of CosineNoiseScheduler, as JSON; "
        "they are added to the recipe's",
        {},
    )
    prediction_type: str | None = _setting(
        "what the network predicts: epsilon, sample or v_prediction; default: as scheduler says, or epsilon"
    )
    learned_variance: bool = _setting(
        "learn the variance of the reverse process too (Improved DDPM), for bits/dim and for few steps", False
    )
    # optimisation
    train_batch_size: int = _setting("images a process and a micro-batch", 64)
    gradient_accumulation_steps: int = _setting("micro-batches an update", 1)
    max_train_steps: int | None = _setting("updates; takes the place of num_epochs")
    num_epochs: int = _setting("passes over the data", 100)
    learning_rate: float = _setting("peak learning rate of AdamW", 1e-4)
    lr_scheduler: str = _setting("after the warm-up: constant, or cosine or linear to 0", "constant")
    lr_warmup_steps: int = _setting("updates of linear warm-up", 500)
    adam_beta1: float = _setting("AdamW: decay of the mean", 0.9)
    adam_beta2: float = _setting("AdamW: decay of the mean square", 0.999)
    adam_weight_decay: float = _setting("AdamW: weight decay", 0.0)
    adam_epsilon: float = _setting("AdamW: epsilon", 1e-8)
    max_grad_norm: float = _setting("clip the norm of the gradient to this", 1.0)
    ema_max_decay: float = _setting("decay of the moving average of the weights, which warms up to it", 0.9999)
    snr_gamma: float | None = _setting("weight the loss by min-SNR-gamma with this gamma; the paper's is 5")
    antithetic_timesteps: bool = _setting(
        "spread the timesteps of an update evenly, from one random offset, in place of drawing each", False
    )
    gradient_checkpointing: bool = _setting(
        "keep few activations and compute them anew in the backward: less memory, more time, the same gradients", False
    )
    compile: bool = _setting(
        "torch.compile the network, which is meant for CUDA; the first update takes minutes", False
    )
    mixed_precision: str | None = _setting("no, bf16, or fp16 (CUDA only); default: as `accelerate launch` says, or no")
    seed: int = _setting("of weights, order of the data, noise, timesteps and samples", 0)
    # saving and looking
    checkpointing_steps: int = _setting("save, measure the held-out loss and draw samples every so many updates", 1000)
    checkpoints_total_limit: int = _setting("checkpoints to keep", 2)
    resume_from_checkpoint: str | None = _setting("`latest`, or the folder of a checkpoint")
    eval_batch_size: int = _setting("images in the grid of samples; of classes at least one each", 64)
    ddpm_num_inference_steps: int = _setting("steps in which they are sampled", 50)
    guidance_scale: float = _setting("classifier-free guidance of the samples of classes; 1: none", 1.0)
    preview_time_share: float = _setting(
        "part of the training time that previews may take; the last is always drawn", 0.05
    )
    logger: str | None = _setting("tensorboard, wandb or trackio, beside log.csv")
    push_to_hub: bool = _setting("upload the pipeline at each save, in the background, and at the end", False)
    hub_model_id: str | None = _setting("<user>/<name> of the repository; default: the name of output_dir")
    hub_private_repo: bool = _setting("make the repository private", False)

    def __post_init__(self):
        for name in ("unet", "scheduler"):
            setattr(self, name, _as_dict(name, getattr(self, name)))
        self._check_types()
        if self.output_dir is None:
            data = self.train_data_dir or self.dataset_name
            name = Path(os.path.abspath(data)).name if data else ""  # of the folder that `.` and `photos/` mean
            self.output_dir = str(Path("runs", name or Path(self.config).stem))
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_epochs", "checkpointing_steps"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("checkpoints_total_limit", "eval_batch_size", "ddpm_num_inference_steps"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("max_train_steps", "resolution", "channels"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "must be at least 1")
        for name in ("lr_warmup_steps", "adam_weight_decay", "dataloader_num_workers", "guidance_scale"):
            self._check(name, getattr(self, name) >= 0, "must be at least 0")
        self._check("guidance_scale", self.guidance_scale < math.inf, "must be finite")
        guided = self.guidance_scale != 1
        self._check("guidance_scale", self.class_conditional or not guided, "needs class_conditional")
        self._check("label_dropout", self.label_dropout or not guided, "must be greater than 0 for guidance_scale")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "snr_gamma"):
            self._check(
                name,
                getattr(self, name) is None or 0 < getattr(self, name) < math.inf,
                "must be greater than 0 and finite",
            )
        self._check("seed", 0 <= self.seed < 2**63, "must lie in 0 ... 2^63 - 1")
        for name in (
            "adam_beta1",
            "adam_beta2",
            "ema_max_decay",
            "max_bad_fraction",
            "preview_time_share",
            "label_dropout",
        ):
            self._check(name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)")
        under = self.background
        self._check("background", under is None or (under and all(0 <= v <= 1 for v in under)), "must lie in 0 ... 1")
        self._check_choice("logger", (None, "tensorboard", "wandb", "trackio"))
        self._check("streaming", not self.streaming or self.max_train_steps is not None, "needs max_train_steps")
        self._check_choice("prediction_type", (None, *PREDICTION_TYPES))
        also = self.scheduler.get("prediction_type", self.prediction_type)
        same = self.prediction_type in (None, also)
        self._check("prediction_type", same, f"and scheduler has the prediction_type {also!r}: give one of them")
        self._check_choice("lr_scheduler", ("constant", "cosine", "linear"))
        self._check_choice("mixed_precision", (None, "no", "bf16", "fp16"))
        black_white = self.value_range
        self._check(
            "value_range",
            black_white is None or (len(black_white) == 2 and black_white[0] < black_white[1]),
            "must be two numbers, the value of black and the greater value of white",
        )

    def _check_types(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            options = tuple(typing.get_origin(option) or option for option in options)
            if float in options and type(value) is int:
                setattr(self, name, float(value))
            elif type(value) not in options:
                wanted = " or ".join("null" if o is types.NoneType else o.__name__ for o in options)
                self._check(name, False, f"must be {wanted}")
            elif type(value) is list:
                self._check(name, all(type(v) in (int, float) for v in value), "must hold numbers")

    def _check(self, name, holds, rule):
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {rule}")

    def _check_choice(self, name, choices):
        self._check(name, getattr(self, name) in choices, f"must be one of {', '.join(filter(None, choices))}")

    def save(self, path) -> None:
        """As JSON that runs again as it stands: from the beginning, however this run came to be."""
        again = dataclasses.replace(self, resume_from_checkpoint=None, overwrite_output_dir=False)
        files.write(path, json.dumps(dataclasses.asdict(again), indent=2) + "\n")


def recipe_names() -> list[str]:
    return sorted(path.name[: -len(".yaml")] for path in resources.files("ddpm_hf").joinpath("recipes").iterdir())


def recipe_text(name: str) -> str:
    """The YAML file of a packaged recipe; its first line is a comment that says what the recipe is for."""
    return resources.files("ddpm_hf").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str) -> dict:
    """Settings of a packaged recipe or of a YAML or JSON file, as a dict of some of `TrainConfig`'s fields."""
    names = recipe_names()
    if name_or_path in names:
        text = recipe_text(name_or_path)
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"config={name_or_path!r} must be a text file in UTF-8: {error}") from error
    else:
        raise ValueError(f"config={name_or_path!r} is neither a file nor one of the recipes {', '.join(names)}")
    try:
        recipe = YamlLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"config={name_or_path!r} is not YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"config={name_or_path!r} must hold settings, one `name: value` a line")
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for key in recipe:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"config={name_or_path!r}: there is no setting {key!r}{hint}")
    return {"config": name_or_path, **recipe}


def parse_train_config(args: list[str]) -> TrainConfig:
    """Flags over recipe over defaults. `unet` and `scheduler` are merged key by key."""
    return resolve(parse_flags(args))


def parse_flags(args: list[str]) -> dict:
    """The settings that are given on the command line, and no others."""
    parser = _Parser([TrainConfig], prog="train", allow_abbrev=False)
    for action in parser._actions:
        if action.dest != "help":
            action.default = None  # so that only what was given is in `flags`
    given, unknown = parser.parse_known_args(args)
    flags = {name: value for name, value in vars(given).items() if value is not None}
    if unknown:
        parser.error(f"there is no flag {unknown[0]!r}")
    return flags


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


class YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and no is a word, as everywhere else."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(message)


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
