"""The callbacks of `ddpm-hf train`: print and record the run, evaluate digits, write the model card, and upload."""

import json
import logging

from ddpm_hf.data.dataset import has_embedded_digits
from ddpm_hf.evaluation.legibility import digits_legibility
from ddpm_hf.hub.background import PushInBackground
from ddpm_hf.hub.cards import EVALUATION, FACTS, read_facts, write_card
from ddpm_hf.training import Run, TrainCallback
from ddpm_hf.training.facts import facts_of
from ddpm_hf.training.pictures import draw_data
from ddpm_hf.utils.files import set_aside, write
from ddpm_hf.utils.results import read_evaluation

log = logging.getLogger(__name__)


class Report(TrainCallback):
    """Prints a summary, draws data.png, measures the legibility of digits, and writes run.json and the model card."""

    def on_train_begin(self, run: Run) -> None:
        parameters = sum(p.numel() for p in run.pipeline.unet.parameters())
        shape = "x".join(map(str, run.images.shape))
        count = "a stream of" if run.images.num_images is None else run.images.num_images
        print(
            f"{type(run.pipeline.unet).__name__} of {parameters / 1e6:.2f} M parameters, {count} images of "
            f"{shape}, {run.total_steps - run.step} updates to go -> {run.output_dir}",
            flush=True,
        )
        draw_data(run)

    def on_evaluate(self, run: Run) -> list[dict] | None:
        config, main = run.config, run.accelerator.is_main_process
        readable = has_embedded_digits(config) and run.pipeline.unet.config.sample_size == 8
        if not (main and run.finished and readable):
            return None
        steps, guidance = config.ddpm_num_inference_steps, config.guidance_scale
        legibility = digits_legibility(run.pipeline, steps, config.seed, guidance_scale=guidance)
        print(legibility, flush=True)
        return legibility.metrics()

    def on_save(self, run: Run) -> None:
        write_facts_and_card(run)


class Upload(TrainCallback):
    """Uploads the model in the background at each save."""

    def __init__(self, pushing: PushInBackground):
        self.pushing = pushing

    def on_init_end(self, run: Run) -> None:
        self.pushing.check(run)

    def on_save(self, run: Run) -> None:
        self.pushing(run)


def write_facts_and_card(run) -> None:
    """Write run.json, and README.md unless it was edited. Damaged files are renamed.

    A failure is logged; training continues.
    """
    try:
        for path, read in ((run.output_dir / FACTS, read_facts), (run.output_dir / EVALUATION, read_evaluation)):
            try:
                if path.exists():
                    read(path)
            except ValueError as error:
                set_aside(path, str(error))
        facts = facts_of(run, before=read_facts(run.output_dir / FACTS))
        write(run.output_dir / FACTS, json.dumps(facts, indent=2) + "\n")
        write_card(run.pipeline, run.output_dir)
    except Exception as error:
        log.warning(f"update {run.step} has no model card; training continues: {type(error).__name__} {error}")
