"""Compare diffusers' solvers in one picture: a row for each solver, a column for each number of steps."""

import itertools
import logging
import time

from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf.pipelines.images import NotFiniteError
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.utils.pictures import grid
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

    Below the samples is the time they took. A cell is empty if the solver does not support the number of steps or the
    model's betas, or if its samples are not finite; a warning is logged.

    Args:
        solvers: names in `solvers` of our class for the model's scheduler.
        num_images: images per cell.
        settings: further arguments of the pipeline's call.

    Raises:
        ValueError: an argument is invalid, or no cell has samples.
    """
    kind = scheduler_class(pipeline.scheduler.config)
    for solver in solvers:
        if solver not in kind.solvers:
            raise ValueError(f"solvers: {solver!r} is not a solver; choose from {', '.join(kind.solvers)}")
    cells, captions, failed = [], [], None
    warm = False  # the first call takes longer, so its time is not shown
    for solver, n in tqdm(list(itertools.product(solvers, steps)), "solvers", leave=False):
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
                reason = "not finite"
            elif solver == kind.own or not 1 <= n <= pipeline.scheduler.config.num_train_timesteps:
                raise
            else:
                reason = "not supported"
            log.warning(f"{solver} with {n} steps is left out: {error}")
            failed = error
            cells += [None] * num_images
            captions.append(reason)
        else:
            cells += list(images)
            captions.append(f"{took:.2f} s")
    if not warm:  # no cell has images
        raise failed
    return grid(
        cells,
        num_images * len(steps),
        title="samples of the same noise by solver (rows) and number of steps (columns), and the time they took",
        column_names=[f"{n} steps" for n in steps],
        row_names=solvers,
        captions=captions,
        gaps={num_images * k: 3 for k in range(1, len(steps))},
        has_alpha=pipeline.unet.config.get("has_alpha"),
    )
