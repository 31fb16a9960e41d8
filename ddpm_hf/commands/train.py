"""Train a model on images, from a recipe and from settings that change it."""

import dataclasses
import json
import logging
import sys
import typing

from ddpm_hf.commands.parsing import add_setting

log = logging.getLogger(__name__)

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
    from ddpm_hf.config import HEADINGS, TrainConfig

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

    from ddpm_hf import pictures, recipe_choice, training
    from ddpm_hf.allocator import tune_process
    from ddpm_hf.background import PushInBackground
    from ddpm_hf.data import has_embedded_digits

    tune_process()
    config = recipe_choice.for_training(vars(args))
    on_start, on_save = [_announce], [write_facts_and_card]
    if config.push_to_hub:
        pushing = PushInBackground()
        disable_progress_bars()  # beside that of the training
        on_start.insert(0, pushing.check)
        on_save.append(pushing)
    if has_embedded_digits(config):  # before the card
        on_save.insert(0, _measure_legibility)
    run = training.train(
        config, on_start=on_start, on_save=on_save, preview=pictures.draw_pictures, on_begin=[pictures.draw_data]
    )
    if config.push_to_hub and run.accelerator.is_main_process:
        if not run.stopped_by:
            pushing.finish(run)
        elif run.finished:
            print(f"the model is trained and saved in {run.output_dir}, and not pushed: stopped by {run.stopped_by}; "
                  f"ddpm-hf push {run.output_dir} {pushing.repo_id} does it", file=sys.stderr)  # fmt: skip
    return run.exit_status


def _announce(run) -> None:
    parameters = sum(p.numel() for p in run.pipeline.unet.parameters())
    shape = "x".join(map(str, run.images.shape))
    count = "a stream of" if run.images.num_images is None else run.images.num_images
    print(
        f"{type(run.pipeline.unet).__name__} of {parameters / 1e6:.2f} M parameters, {count} images of "
        f"{shape}, {run.total_steps - run.step} updates to go -> {run.output_dir}",
        flush=True,
    )


def write_facts_and_card(run) -> None:
    """After a save: write run.json, and README.md unless somebody has edited it.

    Damaged files are set aside. A failure is logged; training continues.
    """
    from ddpm_hf.cards import EVALUATION, FACTS, read_facts, write_card
    from ddpm_hf.facts import facts_of
    from ddpm_hf.files import set_aside, write
    from ddpm_hf.results import read_evaluation

    try:
        for path, read in ((run.output_dir / FACTS, read_facts), (run.output_dir / EVALUATION, read_evaluation)):
            try:
                if path.exists():
                    read(path)
            except ValueError as error:  # not the model itself, so the run does not depend on it
                set_aside(path, str(error))
        facts = facts_of(run, before=read_facts(run.output_dir / FACTS))
        write(run.output_dir / FACTS, json.dumps(facts, indent=2) + "\n")
        write_card(run.pipeline, run.output_dir)
    except Exception as error:
        log.warning(f"training goes on, but update {run.step} has no card: {type(error).__name__} {error}")


def _measure_legibility(run) -> None:
    if run.finished and run.pipeline.unet.config.sample_size == 8:  # what the classifier can read
        from ddpm_hf.legibility import digits_legibility

        config = run.config
        steps, guidance = config.ddpm_num_inference_steps, config.guidance_scale
        legibility = digits_legibility(run.pipeline, steps, config.seed, guidance_scale=guidance)
        run.metrics.extend(legibility.metrics())
        print(legibility, flush=True)
