"""Train a model on images, from a recipe and from settings that change it."""

import dataclasses
import sys
import typing

from ddpm_hf.commands.parsing import add_setting

# Flags of diffusers' train_unconditional.py that are something else here.
HINTS = {
    "--cache_dir": "set the environment variable HF_HOME in its place",
    "--center_crop": "--resolution always crops the centre; leave it out",
    "--ddpm_beta_schedule": """use --scheduler '{"beta_schedule": "linear"}'""",
    "--ddpm_num_steps": """use --scheduler '{"num_train_timesteps": 1000}'""",
    "--ema_inv_gamma": "the EMA's decay is min(--ema_max_decay, (1 + n) / (10 + n)) at update n",
    "--ema_power": "the EMA's decay is min(--ema_max_decay, (1 + n) / (10 + n)) at update n",
    "--enable_xformers_memory_efficient_attention": "attention is always PyTorch's, which needs little memory",
    "--hub_token": "log in with `hf auth login`, or set the environment variable HF_TOKEN",
    "--local_rank": "leave it out: launchers set the environment variable LOCAL_RANK",
    "--logging_dir": "leave it out: logs are written in --output_dir",
    "--model_config_name_or_path": "use --unet for the network's arguments, or --pretrained_model_name_or_path",
    "--preserve_input_precision": "leave it out: images of more than 8 bits stay as they are; --value_range is needed",
    "--save_images_epochs": "use --checkpointing_steps, in updates",
    "--save_model_epochs": "use --checkpointing_steps, in updates",
    "--use_ema": "leave it out: the EMA of the weights is always kept and is what is saved",
}


def add_arguments(parser) -> None:
    """A flag for each field of `TrainConfig`, under the heading that the field names."""
    from ddpm_hf.training.config import HEADINGS, TrainConfig

    types, groups = typing.get_type_hints(TrainConfig), {}
    for field in sorted(dataclasses.fields(TrainConfig), key=lambda f: HEADINGS.index(f.metadata["group"])):
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        options = _options(types[field.name]) | {"help": field.metadata["help"].replace("%", "%%")}
        default = None if field.default is dataclasses.MISSING else field.default
        add_setting(groups[heading], f"--{field.name}", default, **options)


def _options(hint) -> dict:
    """How argparse reads a field of this type; a dict is JSON, which `TrainConfig` reads."""
    kinds = typing.get_args(hint) or (hint,)
    if hint is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if list[float] in kinds:
        return {"type": float, "nargs": "+", "metavar": "X"}
    if dict in kinds:
        return {"metavar": "JSON"}
    return {"type": kinds[0], "metavar": {str: "TEXT", int: "N", float: "X"}[kinds[0]]}


def _boolean(text: str) -> bool:
    choices = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in choices:
        raise ValueError(text)
    return choices[text.lower()]


_boolean.__name__ = "true or false"  # argparse: invalid true or false value: 'maybe'


def run(args) -> int:
    from huggingface_hub.utils import disable_progress_bars

    from ddpm_hf.commands.train_callbacks import Report, Upload
    from ddpm_hf.hub.background import PushInBackground
    from ddpm_hf.training import train
    from ddpm_hf.training.pictures import draw_pictures
    from ddpm_hf.training.previews import Previews
    from ddpm_hf.training.recipes import for_training
    from ddpm_hf.utils.memory import tune_process

    config = for_training(vars(args))
    callbacks, pushing = [Previews(draw_pictures), Report()], PushInBackground()
    if config.push_to_hub:
        disable_progress_bars()  # beside that of the training
        callbacks.append(Upload(pushing))
    tune_process()
    run = train(config, callbacks)
    if config.push_to_hub and run.accelerator.is_main_process:
        if not run.stopped_by:
            pushing.finish(run)
        elif run.finished:
            print(f"the model is trained and saved in {run.output_dir}, and not pushed: stopped by {run.stopped_by}; "
                  f"ddpm-hf push {run.output_dir} {pushing.repo_id} does it", file=sys.stderr)  # fmt: skip
    return run.exit_status
