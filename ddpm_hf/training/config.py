"""`TrainConfig`: all settings of a training run, read from flags and recipes and saved as train_config.json."""

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ddpm_hf.data.archives import ZIP
from ddpm_hf.data.config import BELOW_1, EARLIER_SPLIT, EMBEDDED_DIGITS, DataConfig, setting
from ddpm_hf.models.unet import ARGUMENTS
from ddpm_hf.schedulers.noise import PREDICTION_TYPES, SETTINGS, NoiseScheduler
from ddpm_hf.schedulers.solvers import CONTINUOUS, scheduler_class
from ddpm_hf.training.flow import FLOW_TIMES
from ddpm_hf.utils import files
from ddpm_hf.utils.arguments import check, check_all, check_names, integer, matching, number, one_of, parse_json, show
from ddpm_hf.utils.yaml_files import read_yaml

AT_LEAST_1, POSITIVE = integer(1), number(above=0)
MAPPING = matching(lambda v: isinstance(v, dict), "must be a mapping such as '{\"dropout\": 0.1}'")
SIGMA_REL = number(0.001, 0.28)
BATCH = integer(1, 2**20, "a batch is in memory at once")
RECIPES = resources.files("ddpm_hf") / "recipes"
HEADINGS = ("run", "data", "model", "optimisation", "saving and previews")  # in `--help`, in this order
_run, _data, _model, _optimisation, _saving = (functools.partial(setting, heading) for heading in HEADINGS)


# Settings of one kind of objective only
OF_DDPM = ("prediction_type", "learned_variance", "snr_gamma")
OF_CONTINUOUS = ("flow_times", "noise_level_mean", "noise_level_std")


@dataclass
class TrainConfig(DataConfig):
    """All settings. Each field is also a flag, a key in recipes and a key in `train_config.json`.

    Settings that diffusers' `train_unconditional.py` has too have the same names. Steps are optimizer updates.
    An invalid value raises a ValueError that names the setting and the valid values.
    """

    config: str = _run(
        "the recipe: the name of a packaged one (see `ddpm-hf recipes`) or the path of a YAML or JSON file; default: "
        "digits, or the recipe for the size of the images if --train_data_dir or --dataset_name is given",
        "digits",
    )
    output_dir: str | None = _run(
        "folder for all results; default: runs/<recipe>, or runs/<name of the data> for your own data"
    )
    overwrite_output_dir: bool = _run("replace the run or model in output_dir", False)
    random_flip: bool = _data("flip each image horizontally with probability 1/2", False)
    random_vertical_flip: bool = _data("flip each image vertically with probability 1/2", False)
    random_rotate90: bool = _data(
        "turn each image by 0, 90, 180 or 270 degrees with equal probability; for square images", False
    )
    class_balance: float = _data(
        "0: every image is seen once per epoch; 1: all classes equally often; in between, a class of n images in "
        "proportion to n^(1 - class_balance)",
        0.0,
        number(0, 1),
    )
    class_conditional: bool = _data(
        "train a class-conditional network; the classes are a ClassLabel column or one folder per class", False
    )
    label_dropout: float = _data(
        "drop the class label of this fraction of the images; classifier-free guidance needs it", 0.1, BELOW_1
    )
    data_license: str | None = _data("licence of the images for the model card; default: that of the data set")
    pretrained_model_name_or_path: str | None = _model(
        "fine-tune this pipeline (a folder or a Hub id) instead of training the recipe's network from scratch"
    )
    unet: dict | str | None = _model("arguments of DDPMUNet as JSON; they override those of the recipe", {}, MAPPING)
    objective: str = _model(
        "what is learnt: ddpm; flow (flow matching along straight lines); or edm (preconditioning and noise levels of "
        "Karras et al. 2022)",
        "ddpm",
        one_of("ddpm", *CONTINUOUS),
    )
    scheduler: dict | str | None = _model(
        "arguments of the scheduler as JSON: LinearNoiseScheduler (CosineNoiseScheduler if beta_schedule is "
        "squaredcos_cap_v2), FlowMatchScheduler or EDMScheduler, by objective; they override those of the recipe",
        {},
        MAPPING,
    )
    prediction_type: str | None = _model(
        "what the network predicts: epsilon, sample or v_prediction; default: as in scheduler, or epsilon",
        rule=one_of(*PREDICTION_TYPES),
    )
    learned_variance: bool = _model(
        "also learn the variance of the reverse process (Improved DDPM), for bits/dim and few steps", False
    )
    flow_times: str | None = _model(
        "distribution of the times of objective=flow: logit_normal or uniform; default: logit_normal",
        rule=one_of(*FLOW_TIMES),
    )
    noise_level_mean: float | None = _model(
        "mean of the normal distribution of the noise levels in training: of logit(t) with objective=flow (default 0), "
        "of ln(sigma) with edm (default -1.2)",
        rule=number(-20, 20),
    )
    noise_level_std: float | None = _model(
        "its standard deviation (default: 1 with objective=flow, 1.2 with edm)", rule=number(above=0, most=20)
    )
    sampling_scheduler: str | None = _model(
        "the solver of samples in few steps, which the pipeline uses by itself: for instance unipc, dpm++ or ddim; "
        "default: the model's own scheduler",
        rule=one_of(*dict.fromkeys(name for kind in (NoiseScheduler, *CONTINUOUS.values()) for name in kind.solvers)),
    )
    sampling_steps: int | None = _model(
        "the number of steps in which the pipeline samples by itself; default: all timesteps", rule=AT_LEAST_1
    )
    train_batch_size: int = _optimisation("images per process and micro-batch", 64, BATCH)
    gradient_accumulation_steps: int = _optimisation("micro-batches per update", 1, AT_LEAST_1)
    max_train_steps: int | None = _optimisation("number of updates; overrides num_epochs", rule=AT_LEAST_1)
    num_epochs: int = _optimisation("number of passes over the data", 100, AT_LEAST_1)
    optimizer: str = _optimisation(
        "adamw; or muon, for the weights of all linear layers and convolutions but the first and the last, with AdamW "
        "for the rest",
        "adamw",
        one_of("adamw", "muon"),
    )
    learning_rate: float = _optimisation("peak learning rate of AdamW", 1e-4, POSITIVE)
    muon_learning_rate: float = _optimisation("peak learning rate of Muon", 8e-3, POSITIVE)
    lr_scheduler: str = _optimisation(
        "after the warm-up: constant; cosine or linear decay to 0; or wsd, constant and then a linear decay to 0",
        "constant",
        one_of("constant", "cosine", "linear", "wsd"),
    )
    lr_decay_share: float = _optimisation(
        "lr_scheduler=wsd: share of all updates, the last ones, in which the learning rate falls to 0",
        0.4,
        number(above=0, most=1),
    )
    lr_warmup_steps: int = _optimisation("number of updates of linear warm-up", 500, integer(0))
    adam_beta1: float = _optimisation("AdamW: decay rate of the mean of the gradient", 0.9, BELOW_1)
    adam_beta2: float = _optimisation("AdamW: decay rate of the mean of the squared gradient", 0.999, BELOW_1)
    adam_weight_decay: float = _optimisation("AdamW and Muon: weight decay", 0.0, number(0))
    adam_epsilon: float = _optimisation("AdamW: term added to the denominator", 1e-8, POSITIVE)
    max_grad_norm: float = _optimisation("clip the norm of the gradient to this value", 1.0, POSITIVE)
    ema_max_decay: float = _optimisation("final decay rate of the EMA of the weights", 0.9999, BELOW_1)
    ema_sigma_rel: float | None = _optimisation(
        "a power-function EMA that reaches over this share of the updates (0.05 or 0.1 in EDM2), in place of "
        "ema_max_decay",
        rule=SIGMA_REL,
    )
    post_hoc_ema: bool = _optimisation(
        "keep two more averages at each save, of which `ddpm-hf ema` makes one of any length after the training", False
    )
    snr_gamma: float | None = _optimisation(
        "weight the loss by min-SNR-gamma with this gamma (5 in the paper); default: no weights", rule=POSITIVE
    )
    antithetic_timesteps: bool = _optimisation(
        "spread the timesteps of an update evenly from one random offset instead of drawing each", False
    )
    noise_assignment: bool = _optimisation(
        "objective=flow: exchange the noise among the images of each micro-batch (of each class), so that their "
        "squared distances are least",
        False,
    )
    gradient_checkpointing: bool = _optimisation(
        "recompute activations in the backward pass: less memory, more time, the same gradients", False
    )
    compile: bool = _optimisation(
        "compile the network with torch.compile, for CUDA; the first update then takes minutes", False
    )
    mixed_precision: str | None = _optimisation(
        "no, bf16, or fp16 (CUDA only); default: that of `accelerate launch`, or no", rule=one_of("no", "bf16", "fp16")
    )
    checkpointing_steps: int = _saving(
        "number of updates between saves, each with the held-out loss and samples", 1000, AT_LEAST_1
    )
    checkpoints_total_limit: int = _saving("number of checkpoints to keep", 2, AT_LEAST_1)
    post_hoc_ema_limit: int = _saving(
        "post_hoc_ema: number of saves, spread evenly, whose averages are kept", 32, integer(2)
    )
    resume_from_checkpoint: str | None = _saving("folder of the checkpoint to resume from, or `latest`")
    eval_batch_size: int = _saving("number of images in samples.png, at least one per class", 64, BATCH)
    ddpm_num_inference_steps: int = _saving("number of sampling steps for samples.png", 50, AT_LEAST_1)
    guidance_scale: float = _saving("classifier-free guidance scale for samples.png; 1: no guidance", 1.0, number(0))
    preview_time_share: float = _saving(
        "fraction of the training time for samples; the last ones are always generated", 0.05, BELOW_1
    )
    logger: str | None = _saving(
        "also log to tensorboard, wandb or trackio", rule=one_of("tensorboard", "wandb", "trackio")
    )
    push_to_hub: bool = _saving("upload the pipeline in the background at each save, and at the end", False)
    hub_model_id: str | None = _saving("repository to upload to, <user>/<name>; default: the name of output_dir")
    hub_private_repo: bool = _saving("create the repository as private", False)

    def __post_init__(self):
        for name in ("unet", "scheduler"):
            setattr(self, name, _as_dict(name, getattr(self, name)))
        if self.mixed_precision is False:
            self.mixed_precision = "no"  # YAML 1.1 reads `no` as false
        super().__post_init__()
        check_names("unet", self.unet, ARGUMENTS)
        kind = CONTINUOUS.get(self.objective)
        check_names("scheduler", self.scheduler, kind.settings if kind else SETTINGS)
        check_all(self.unet, ARGUMENTS)
        check_all(self.scheduler, (kind or scheduler_class(self.scheduler)).settings)
        for name in OF_DDPM if kind else OF_CONTINUOUS:
            allowed = "objective='ddpm'" if kind else "objective='flow' or 'edm'"
            self._check(name, getattr(self, name) in (None, False), f"needs {allowed}")
        self._check("flow_times", self.flow_times is None or self.objective == "flow", "needs objective='flow'")
        for name in ("noise_level_mean", "noise_level_std") if self.flow_times == "uniform" else ():
            self._check(name, getattr(self, name) is None, "must be None with flow_times='uniform'")
        if self.output_dir is None:
            data = self.train_data_dir or self.dataset_name
            name = Path(os.path.abspath(data)).name if data else ""  # resolves `.` and `photos/`
            name = name[: -len(ZIP)] if name.lower().endswith(ZIP) else name
            self.output_dir = str(Path("runs", name or Path(self.config).stem))
        self._check("streaming", not self.streaming or self.max_train_steps is not None, "needs max_train_steps")
        self._check("class_balance", not (self.class_balance and self.streaming), "must be 0 with streaming=True")
        flow = self.objective == "flow"
        self._check("noise_assignment", flow or not self.noise_assignment, "needs objective='flow'")
        guided = self.guidance_scale != 1
        self._check("guidance_scale", self.class_conditional or not guided, "needs class_conditional=True")
        self._check("label_dropout", self.label_dropout or not guided, "must be greater than 0 for guidance_scale")
        both = self.unet and self.pretrained_model_name_or_path is not None
        self._check("unet", not both, "must be empty with pretrained_model_name_or_path, which has its own network")
        also = self.scheduler.get("prediction_type", self.prediction_type)
        same = self.prediction_type in (None, also)
        self._check("prediction_type", same, f"contradicts prediction_type={show(also)} in scheduler: give one of them")

    def save(self, path) -> None:
        """Save as JSON, a recipe that repeats the run from its beginning even if this run was resumed."""
        again = dataclasses.replace(self, resume_from_checkpoint=None, overwrite_output_dir=False)
        files.write(path, json.dumps(dataclasses.asdict(again), indent=2) + "\n")


def recipe_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir())


def recipe_text(name: str) -> str:
    """The YAML of a packaged recipe. Its first line is a comment that describes its purpose."""
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name_or_path: str) -> dict:
    """Read the settings of a packaged recipe or of a YAML or JSON file; ValueError for unknown settings."""
    names = recipe_names()
    if name_or_path not in names and not Path(name_or_path).is_file():
        raise ValueError(f"config={name_or_path!r} is neither a file nor one of the recipes {', '.join(names)}")
    recipe = read_yaml(RECIPES / f"{name_or_path}.yaml" if name_or_path in names else name_or_path, "config")
    check_names(f"config={show(name_or_path)}", recipe, [f.name for f in dataclasses.fields(TrainConfig)])
    if "config" in recipe:  # the settings of a run
        recipe.setdefault("held_out_split", EARLIER_SPLIT)
    return {"config": name_or_path, **recipe}


def resolve(flags: dict) -> TrainConfig:
    """The configuration of `flags` on top of the recipe `flags["config"]`, by default digits.

    `training/recipes.py` instead chooses the recipe by the size of the images.
    """
    recipe = load_recipe(flags.get("config", "digits"))
    if "pretrained_model_name_or_path" in flags:
        recipe.update(unet={}, scheduler={}, prediction_type=None)  # the pipeline has its own
    if flags.get("objective", recipe.get("objective", "ddpm")) != recipe.get("objective", "ddpm"):
        for name in (
            "scheduler",
            "sampling_scheduler",
            *OF_DDPM,
            *OF_CONTINUOUS,
        ):  # the recipe's belong to its own objective
            recipe.pop(name, None)
    if "num_epochs" in flags:
        recipe.pop("max_train_steps", None)  # it would override num_epochs
    merged = {**recipe, **flags, "config": recipe["config"]}
    for name in ("unet", "scheduler"):
        recipes, flag = _as_dict(name, recipe.get(name)), _as_dict(name, flags.get(name))
        if "beta_schedule" in flag:  # the recipe's betas belong to its own schedule
            recipes = {key: value for key, value in recipes.items() if key not in ("beta_start", "beta_end")}
        merged[name] = {**recipes, **flag}
    own = {"train_data_dir": None, "dataset_name": EMBEDDED_DIGITS, **recipe}  # the data set of the recipe
    trains_on_own = all(flags.get(name, own[name]) == own[name] for name in ("train_data_dir", "dataset_name"))
    if merged.get("output_dir") is None and trains_on_own:
        merged["output_dir"] = str(Path("runs", Path(str(recipe["config"])).stem))  # several recipes share a data set
    return TrainConfig(**merged)


def _as_dict(name, value) -> dict:
    """Parse arguments of a class from a dict, the JSON of one, or None."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"{name}={show(value)} is not a JSON object: {str(error)[:200]}") from None
    return check(name, {} if value is None else value, MAPPING)
