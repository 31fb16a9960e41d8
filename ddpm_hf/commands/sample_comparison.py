"""Compare diffusers' solvers in one picture: a row for each solver, a column for each number of steps."""

import itertools
import logging
import time

from PIL import Image

from ddpm_hf.pipelines.images import NotFiniteError
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.schedulers.solvers import SOLVERS
from ddpm_hf.utils.pictures import grid, with_caption, with_row_names
from ddpm_hf.utils.seeds import image_generators

log = logging.getLogger(__name__)


def compare_solvers(
    pipeline: DDPMCustomPipeline,
    solvers: list[str],
    steps: list[int],
    num_images: int = 4,
    seed: int = 0,
    **settings,
) -> Image.Image:
    """Draw samples of each solver (rows) with each number of steps (columns), all from the same noise.

    The caption of each cell gives the time it took. A cell is empty if the solver does not support the number of steps
    or the model's betas, or if its samples are not finite; a warning is logged.

    Args:
        solvers: names, "ddpm" or keys of `SOLVERS`.
        num_images: images per cell.
        settings: further arguments of the pipeline's call.

    Raises:
        ValueError: an argument is invalid, or no cell has finite samples.
    """
    for solver in solvers:
        if solver not in ("ddpm", *SOLVERS):
            raise ValueError(f"solvers: {solver!r} is not a solver; choose from ddpm, {', '.join(SOLVERS)}")
    cells, failed, scale = [], None, max(1, 48 // max(pipeline.image_shape[1:]))
    warm = False  # the first call takes longer, so its time is not shown
    for solver, n in itertools.product(solvers, steps):
        call = {"scheduler": solver, "num_inference_steps": n, **settings}
        try:
            pipeline.check_call(**call)
            for _ in range(1 if warm else 2):
                began = time.perf_counter()
                generators = image_generators(seed, range(num_images))
                images = pipeline(num_images, generators, output_type="np", **call).images  # waits for the device
                took = time.perf_counter() - began
                warm = True
        except ValueError as error:
            if isinstance(error, NotFiniteError):
                failed, reason = error, "not finite"
            elif solver == "ddpm" or not 1 <= n <= pipeline.scheduler.config.num_train_timesteps:
                raise
            else:
                reason = "not supported"
            log.warning(f"{solver} with {n} steps is left out: {error}")
            cells.append(with_caption(Image.new("L", (1, 1)), [f"{n} steps: {reason}"]))
        else:
            cells.append(with_caption(grid(images, num_images, scale), [f"{n} steps, {took:.2f} s"]))
    if failed is not None and not warm:  # no cell has images
        raise failed
    width, height = (max(cell.size[axis] for cell in cells) + 6 for axis in (0, 1))
    picture = Image.new("RGB", (width * len(steps), height * len(solvers)), "white")
    for k, cell in enumerate(cells):
        picture.paste(cell, (k % len(steps) * width, k // len(steps) * height))
    return with_row_names(picture, solvers)
