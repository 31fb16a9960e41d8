"""The web page of `ddpm-hf demo`: samples, interpolations and films of a model."""

import functools
import html
import math
import shlex
import socket
import tempfile
import time
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ddpm_hf.pipelines.editing import slerp
from ddpm_hf.pipelines.images import PIL_MODES
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, num_classes
from ddpm_hf.schedulers.noise import draw_noise
from ddpm_hf.schedulers.solvers import SOLVERS
from ddpm_hf.utils.pictures import Film, grid, save_film, to_unit_range
from ddpm_hf.utils.seeds import image_generators, seeded_generator

OWN, EACH = "", -1  # choices on the page: the model's own solver, and each class in turn
LARGEST_SEED = 2**53 - 1  # JavaScript's largest exact integer
FILM_FRAMES, SHEET_FRAMES = 40, 10
PROGRESS = gr.Progress()  # as the default of an argument, Gradio replaces it by the page's progress bar
LAUNCH = {
    "theme": gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
    # The margin keeps the picture below the label and the buttons, which would cover it.
    "css": ".picture img {image-rendering: pixelated; margin: 40px auto 8px} pre code {white-space: pre-wrap}",
    "footer_links": [],
    "run_history": False,
    "share": False,
    "ssr_mode": False,  # server-side rendering would need Node.js
}


def draw_samples(pipeline, number, solver, steps, seed, label, guidance_scale, progress=PROGRESS):
    """Draw samples 0 ... `number` - 1 of `seed`.

    Args:
        solver: a name, or `OWN`.
        label: a class, or `EACH`. An unconditional model ignores it and `guidance_scale`.
        progress: called with (steps done, number of steps) after each step.

    Returns:
        A picture, and a text with the time and the command that generates the same samples as files.

    Raises:
        ValueError: the pipeline does not accept an argument.
    """
    began, labels, names = time.perf_counter(), _labels(pipeline, label, number), _class_names(pipeline)
    settings = _settings(pipeline, solver, steps, labels, guidance_scale, progress)
    images = pipeline(number, _generators(seed, number), output_type="np", **settings).images
    took = time.perf_counter() - began
    words = ["ddpm-hf", "sample", pipeline.name_or_path or "MODEL", "--num_images", number, "--seed", seed]
    words += ["--num_inference_steps", steps] + (["--scheduler", solver] if solver else [])
    if names:
        words += ["--guidance_scale", guidance_scale, "--class_labels", *dict.fromkeys(names[k] for k in labels)]
    words += [] if pipeline.image_shape[0] in PIL_MODES else ["--format", "npy"]
    columns = len(names) if label == EACH and 1 < len(names) <= min(number, 10) else math.ceil(math.sqrt(number))
    command = shlex.join(map(str, words))
    return _picture(images, columns), f"{took:.2f} s. The same images as files:\n```\n{command}\n```"


def draw_interpolation(
    pipeline, method, number, steps, t, seed_a, seed_b, label_a, label_b, guidance_scale, progress=PROGRESS
):
    """Draw `number` images between the first samples of two seeds.

    Args:
        method: `"mix"` adds noise up to timestep `t` to the two samples, mixes them and denoises the mixtures; the
            samples themselves are drawn at both ends. `"slerp"` interpolates between the noises of the two seeds on an
            arc, and samples with DDIM.
        label_a, label_b: classes of the first and of the second half of the row.
        others: see `draw_samples`.

    Returns:
        A picture, and a text with the time.
    """
    began, generators = time.perf_counter(), _generators(seed_a, 1) + _generators(seed_b, 1)
    labels = [label_a] * (number - number // 2) + [label_b] * (number // 2)
    of_call = (pipeline, "ddim" if method == "slerp" else OWN, steps)
    settings = {"output_type": "pt", **_settings(*of_call, labels, guidance_scale, progress)}
    if method == "slerp":
        a, b = (draw_noise((1, *pipeline.image_shape), each, "cpu", torch.float32) for each in generators)
        noise = slerp(a, b, torch.linspace(0, 1, number).reshape(-1, 1, 1, 1))
        row, note = pipeline(latents=noise, **settings).images, "The first and the last are the samples of the seeds."
    else:
        of_ends = _settings(*of_call, [label_a, label_b], guidance_scale, progress)
        ends = pipeline(2, generators, output_type="pt", **of_ends).images
        again = seeded_generator(seed_a, "interpolation", seed_b)
        row = pipeline.interpolate(*ends, t, number, method, generator=again, **settings).images
        row, note = torch.cat([ends[:1], row, ends[1:]]), "Between the two samples are their denoised mixtures."
    images = row.permute(0, 2, 3, 1).cpu().numpy()
    return _picture(images, len(images), 1200), f"{time.perf_counter() - began:.2f} s. {note}"


def draw_film(folder, pipeline, number, solver, steps, seed, label, guidance_scale, of, progress=PROGRESS):
    """Make a film of the samples that `draw_samples` draws.

    Args:
        folder: a `TemporaryDirectory` for the film, which Gradio copies.
        of: `"samples"` or `"pred_original_samples"`, the attribute of `Film`.
        others: see `draw_samples`.

    Returns:
        The path of the film, a contact sheet, and a text with the time.
    """
    began, labels, film = time.perf_counter(), _labels(pipeline, label, number), Film()
    settings = _settings(pipeline, solver, steps, labels, guidance_scale, progress, film)
    pipeline(number, _generators(seed, number), output_type="latent", **settings)
    frames = np.stack([to_unit_range(frame) for frame in getattr(film, of)], axis=1)  # (B, frames, H, W, C)
    path = Path(folder.name) / "film.webp"  # lossless, and smaller than a GIF
    save_film([_picture(frames[:, k], number) for k in range(frames.shape[1])], path)
    sheet = frames[:, _spread(frames.shape[1], SHEET_FRAMES)]
    picture = _picture(sheet.reshape(-1, *sheet.shape[2:]), sheet.shape[1])
    return str(path), picture, f"{time.perf_counter() - began:.2f} s, {frames.shape[1]} frames."


def _picture(images: np.ndarray, columns: int, width: int = 780, height: int = 560) -> Image.Image:
    """A `grid` of images (N, H, W, C) in [0, 1], enlarged by the largest integer that fits `width` x `height`."""
    least = grid(images, columns, 1)
    return grid(images, columns, max(1, min(width // least.width, height // least.height)))


def _spread(total: int, most: int) -> list[int]:
    """At most `most` indices in 0 ... `total` - 1, evenly spaced from the first to the last."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(int).tolist()


def _generators(seed, number: int) -> list[torch.Generator]:
    if not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed!r} must be an integer in 0 ... 2^53 - 1")
    return image_generators(seed, range(number))


def _class_names(pipeline) -> list[str]:
    """The names of the classes; [] for an unconditional model."""
    return pipeline.unet.config.get("class_names") or [str(k) for k in range(num_classes(pipeline.unet) or 0)]


def _labels(pipeline, label, number: int) -> list[int]:
    return [k % max(1, len(_class_names(pipeline))) if label == EACH else label for k in range(number)]


def _settings(pipeline, solver, steps, labels, guidance_scale, progress, film=None) -> dict:
    """Arguments of a pipeline call that reports each step to `progress`, and evenly spaced steps to `film`."""

    def on_step(pipeline, step, timestep, tensors):
        progress((step + 1, pipeline.num_timesteps))
        if film is not None:
            film.steps = _spread(pipeline.num_timesteps, FILM_FRAMES)
            film(pipeline, step, timestep, tensors)

    classes = {"class_labels": labels, "guidance_scale": guidance_scale} if _class_names(pipeline) else {}
    return {"num_inference_steps": steps, "scheduler": solver or None, "callback_on_step_end": on_step, **classes}


def with_messages(draw):
    """Wrap `draw` to show a ValueError as a message on the page."""

    @functools.wraps(draw)
    def wrapped(*args):
        try:
            return draw(*args)
        except ValueError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    return wrapped


def _describe(pipeline) -> tuple[str, str]:
    """The name of the model, and a line on its parameters, images, classes and timesteps."""
    source = str(pipeline.name_or_path or "A model")
    title = Path(source).resolve().name if Path(source).is_dir() else source
    names, (channels, height, width) = _class_names(pipeline), pipeline.image_shape
    facts = [f"{sum(p.numel() for p in pipeline.unet.parameters()) / 1e6:.2f} M parameters"]
    facts += [f"images of {height}x{width} pixels and {channels} channel{'s' * (channels > 1)}"]
    facts += [f"{len(names)} classes"] if names else []
    return title, ", ".join([*facts, f"{pipeline.scheduler.config.num_train_timesteps} timesteps"])


def _on_press(button: gr.Button, draw, settings: list, shown: list) -> None:
    # All buttons use the same pipeline, which can run one call at a time.
    button.click(draw, settings, shown, concurrency_limit=1, concurrency_id="pipeline")


def build_demo(pipeline: DDPMCustomPipeline) -> gr.Blocks:
    """Build the page of a model, for `serve` or `.launch(**LAUNCH)`.

    Images of 1 to 4 channels are shown as L, LA, RGB and RGBA; other images as their channels side by side, in gray.
    """
    title, facts = _describe(pipeline)
    names, T = _class_names(pipeline), pipeline.scheduler.config.num_train_timesteps

    def images(most: int, value: int, least: int = 1):
        return gr.Slider(least, most, value, step=1, label="Images")

    def steps():
        return gr.Slider(1, T, min(50, T), step=1, label="Steps")

    def seed(label: str, value: int):
        return gr.Number(value, label=label, precision=0, minimum=0, maximum=LARGEST_SEED)

    def class_label(label: str, *more: tuple[str, int]):
        choices = [*more, *((name, k) for k, name in enumerate(names))]
        return gr.Dropdown(choices, label=label, visible=bool(names))

    def guidance():
        info = "1 disables it; 0 ignores the class"
        return gr.Slider(0, 8, 1, step=0.5, label="Guidance", info=info, visible=bool(names))

    def sampling(most: int, number: int) -> list:
        own = f"the model's own ({type(pipeline.scheduler).__name__})"
        settings = [images(most, number), gr.Dropdown([(own, OWN), "ddpm", *SOLVERS], label="Solver")]
        return [*settings, steps(), seed("Seed", 0), class_label("Class", ("each in turn", EACH)), guidance()]

    def picture(label: str):
        given = {"format": "png", "image_mode": None, "buttons": ["download", "fullscreen"]}
        return gr.Image(label=label, interactive=False, elem_classes="picture", **given)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        what = "A denoising diffusion probabilistic model: each step removes some noise until an image remains."
        gr.Markdown(f"# {html.escape(title)}\n{what}  \n{facts}.")
        with gr.Tab("Samples"), gr.Row():
            with gr.Column():
                settings = sampling(64, min(2 * len(names), 20) or 16)
                button = gr.Button("Draw samples", variant="primary")
            with gr.Column(scale=2):
                shown = [picture("Samples"), gr.Markdown()]
            _on_press(button, functools.partial(with_messages(draw_samples), pipeline), settings, shown)
        with gr.Tab("Interpolation"):
            with gr.Row():
                settings = [gr.Radio(["mix", "slerp"], value="mix", label="Method"), images(16, 9, least=2), steps()]
                settings += [gr.Slider(0, T - 1, T // 2, step=1, label="Timestep of the mix")]
            with gr.Row():
                settings += [seed("First seed", 0), seed("Last seed", 1)]
                settings += [class_label("First class"), class_label("Last class"), guidance()]
            button = gr.Button("Interpolate", variant="primary")
            shown = [picture("Images between images"), gr.Markdown()]
            _on_press(button, functools.partial(with_messages(draw_interpolation), pipeline), settings, shown)
        with gr.Tab("Film"), gr.Row():
            with gr.Column():
                whats = [("noisy images x_t", "samples"), ("predicted images x_0", "pred_original_samples")]
                settings = [*sampling(8, 4), gr.Radio(whats, value="samples", label="Show")]
                button = gr.Button("Make a film", variant="primary")
            with gr.Column(scale=2):
                shown = [picture("Film"), picture("Contact sheet"), gr.Markdown()]
            film = functools.partial(with_messages(draw_film), tempfile.TemporaryDirectory(), pipeline)
            _on_press(button, film, settings, shown)
    return page


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serve the page in background threads, and return its address.

    Args:
        port: 0 chooses a free port.

    Raises:
        ValueError: the host or the port can't be used.
    """
    try:
        with socket.create_server((host, port)) as free:  # gives a clearer error than Gradio
            port = free.getsockname()[1]
        return page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **LAUNCH)[1]
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port}: the server can't listen there: {error}") from error
