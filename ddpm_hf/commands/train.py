"""Train a model on images, with the settings of a recipe and of the flags."""

import dataclasses
import shlex
import sys
import typing

from ddpm_hf.commands.device import add_device, pop_device
from ddpm_hf.commands.parsing import add_field

# Flags of diffusers' training scripts that have another name here, or no equivalent.
HINTS = {
    "--cache_dir": "set the environment variable HF_HOME instead",
    "--center_crop": "leave it out: --resolution crops the centre, unless --resize says otherwise",
    "--ddpm_beta_schedule": """use --scheduler '{"beta_schedule": "linear"}'""",
    "--ddpm_num_steps": """use --scheduler '{"num_train_timesteps": 1000}'""",
    "--ema_inv_gamma": "the EMA's decay is min(--ema_max_decay, (1 + n) / (10 + n)) at update n",
    "--ema_power": "the EMA's decay is min(--ema_max_decay, (1 + n) / (10 + n)) at update n",
    "--enable_xformers_memory_efficient_attention": "leave it out: PyTorch's attention needs little memory",
    "--hub_token": "log in with `hf auth login`, or set the environment variable HF_TOKEN",
    "--local_rank": "leave it out: launchers set the environment variable LOCAL_RANK",
    "--logging_dir": "leave it out: logs are written to --output_dir",
    "--model_config_name_or_path": "use --unet for the network's arguments, or --pretrained_model_name_or_path",
    "--preserve_input_precision": "leave it out: images keep their precision; set --value_range for more than 8 bits",
    "--num_train_epochs": "use --num_epochs",
    "--report_to": "use --logger",
    "--save_images_epochs": "use --checkpointing_steps, in updates",
    "--save_model_epochs": "use --checkpointing_steps, in updates",
    "--use_ema": "leave it out: EMA weights are always computed and saved",
}


def add_arguments(parser) -> None:
    add_settings(parser)
    add_device(parser.add_argument_group("device"))


def add_settings(parser) -> None:
    """Add a flag for each field of `TrainConfig`, under the heading of the field."""
    from ddpm_hf.training.config import HEADINGS, TrainConfig

    types, groups = typing.get_type_hints(TrainConfig), {}
    for field in sorted(dataclasses.fields(TrainConfig), key=lambda f: HEADINGS.index(f.metadata["group"])):
        heading = field.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        add_field(groups[heading], field, types[field.name])


def run(args) -> int:
    from huggingface_hub.utils import disable_progress_bars

    from ddpm_hf.commands.train_callbacks import Report, Upload
    from ddpm_hf.hub.background import PushInBackground
    from ddpm_hf.training import train
    from ddpm_hf.training.pictures import draw_pictures
    from ddpm_hf.training.previews import Previews
    from ddpm_hf.training.recipes import for_training
    from ddpm_hf.utils.memory import tune_process

    pop_device(args)
    config = for_training(vars(args))
    callbacks, pushing = [Previews(draw_pictures), Report()], PushInBackground()
    if config.push_to_hub:
        disable_progress_bars()  # of uploads, which would break the bar of the training
        callbacks.append(Upload(pushing))
    tune_process()
    run = train(config, callbacks)
    if run.finished and not run.stopped_by and run.accelerator.is_main_process:
        folder = shlex.quote(str(run.output_dir))
        print(
            f"The model and its pictures are in {folder}. Next: `ddpm-hf sample {folder}` and `ddpm-hf demo {folder}` "
            f"generate images, `ddpm-hf evaluate {folder}` measures how good they are."
        )
    if config.push_to_hub and run.accelerator.is_main_process:
        if not run.stopped_by:
            pushing.finish(run)
        elif run.finished:
            print(f"the trained model is saved in {run.output_dir}, but {run.stopped_by} came before its upload; "
                  f"upload it with `ddpm-hf push {run.output_dir} {pushing.repo_id}`", file=sys.stderr)  # fmt: skip
    return run.exit_status
