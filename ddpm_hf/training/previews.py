"""Samples drawn while training, by all processes together and within a share of the time; an error ends no run."""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache

from ddpm_hf.pipelines.images import to_output
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.training.run import Run, TrainCallback
from ddpm_hf.utils.distributed import in_all
from ddpm_hf.utils.memory import is_out_of_memory
from ddpm_hf.utils.seeds import image_generators
from ddpm_hf.utils.signals import Stopped, StopSignals, stop_requested

log = logging.getLogger(__name__)


class Previews(TrainCallback):
    """Draws samples in all processes, as often as `preview_time_share` of the time so far allows.

    What it will take is guessed from the training's speed, and then known from the last time. The last preview of a run
    is always drawn. If one fails, that is logged and training continues.

    Args:
        draw: called with the `Run`; returns what it has measured, a list of metrics, or None.
    """

    BACKWARD = 2  # costs this many forward passes

    def __init__(self, draw: Callable[[Run], list[dict] | None]):
        self.draw, self.spent, self.last, self.began, self.logged = draw, 0.0, None, time.monotonic(), False

    def on_evaluate(self, run: Run) -> list[dict] | None:
        """Draw if there is time for it."""
        config, expected, share = run.config, self.last, run.config.preview_time_share
        images_per_second = run.log_history[-1]["images_per_second"] if run.log_history else None
        if expected is None and images_per_second:
            passes = 2 * config.eval_batch_size * config.ddpm_num_inference_steps  # EMA and training weights
            passes *= 1 if config.guidance_scale == 1 else 2
            expected = passes / ((1 + self.BACKWARD) * images_per_second)
        elapsed = time.monotonic() - self.began
        allowed = share * elapsed - self.spent
        due = [run.finished or (expected is not None and expected <= allowed)]
        broadcast_object_list(due)  # each process has a clock of its own, and the main one the log
        if not due[0]:
            if run.accelerator.is_main_process and not self.logged:
                log.warning(
                    f"no preview at update {run.step}: it would take about {expected or 0:.0f} s, and "
                    f"preview_time_share={share:g} of {elapsed:.0f} s has {max(0, allowed):.0f} s left; later then"
                )
                self.logged = True
            return None
        began, metrics = time.monotonic(), None
        try:
            metrics = self.draw(run)
        except Stopped as stopped:
            log.warning(f"no preview of update {run.step}: {stopped}")
        except Exception as error:
            reason = " ".join(str(error).split())
            log.warning(f"the preview of update {run.step} failed ({type(error).__name__}: {reason}); training goes on")
        self.last = time.monotonic() - began
        self.spent += self.last
        return metrics


def sample_together(
    accelerator: Accelerator,
    pipeline: DDPMCustomPipeline,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    frame_steps: tuple[int, ...] = (),
    class_labels: list[int] | None = None,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """The same images however many processes there are and however large a batch their memory has room for.

    Image k has its own generator, of (`seed`, k). Each process makes every so-many-th image, in one batch if it can and
    in halves of it if memory runs out.

    Args:
        frame_steps: numbers of the steps, counted from 0, whose x_t are given besides.
        class_labels: one an image, for a class-conditional network.
        guidance_scale: as the pipeline has it.

    Returns:
        (frames + 1, num_images, H, W, C) in [0, 1], the last of the frames being the samples, in all processes.

    Raises:
        Exception: a process could not. All raise an error then, the others a RuntimeError that names it.
        Stopped: this process was asked to stop.
    """
    own = range(accelerator.process_index, num_images, accelerator.num_processes)

    def sample_own() -> list[tuple[int, np.ndarray]]:
        labels = None if class_labels is None else [class_labels[k] for k in own]
        return list(zip(own, _sample(pipeline, own, num_inference_steps, seed, frame_steps, labels, guidance_scale)))

    made = dict(in_all(sample_own, accelerator))
    return np.stack([made[k] for k in range(num_images)], axis=1)


def _sample(pipeline, numbers: Sequence[int], steps: int, seed, frame_steps, labels, guidance) -> list[np.ndarray]:
    """(frames + 1, H, W, C) in [0, 1] of each image of these numbers."""
    done, batch_size = [], len(numbers)
    while len(done) < len(numbers):
        part = slice(len(done), len(done) + batch_size)
        batch, frames = numbers[part], []
        classes = {} if labels is None else {"class_labels": labels[part], "guidance_scale": guidance}

        def keep(_, i, timestep, tensors, frames=frames):
            if stop_requested():
                raise Stopped(StopSignals.active.name)
            if i in frame_steps:
                frames.append(to_output(tensors["sample"], "np"))

        try:
            samples = pipeline(
                len(batch),
                generator=image_generators(seed, batch),
                num_inference_steps=steps,
                output_type="np",
                callback_on_step_end=keep,
                **classes,
            ).images
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            clear_device_cache(garbage_collection=True)
            batch_size = -(-batch_size // 2)
        else:
            done.extend(np.stack([*frames, samples], axis=1))
    return done
