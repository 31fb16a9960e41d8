"""The web page of `ddpm-hf demo`: samples, interpolations and films of a model."""

import html
import tempfile
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ddpm_hf.commands.demo_drawing import (
    EACH,
    LARGEST_SEED,
    OWN,
    class_names,
    draw_film,
    draw_interpolation,
    draw_samples,
    open_with_samples,
    own_copy,
)
from ddpm_hf.commands.demo_server import SIDE_BY_SIDE, WAITING, Drawings, Limits, Page
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.schedulers.solvers import scheduler_class

# The margin keeps the picture below the label and the buttons, which would cover it.
CSS = """
.picture img {image-rendering: pixelated; margin: 40px auto 8px}
.seed button {align-self: flex-end; margin-bottom: 12px}
.dark button[role=tab].selected {color: var(--primary-300)}
pre code {white-space: pre-wrap}
"""


def _describe(pipeline) -> tuple[str, str]:
    """The name of the model, and a line on its parameters, images, classes and timesteps."""
    source = str(pipeline.name_or_path or "A model")
    title = Path(source).resolve().name if Path(source).is_dir() else source
    names, (channels, height, width) = class_names(pipeline), pipeline.image_shape
    facts = [f"{sum(p.numel() for p in pipeline.unet.parameters()) / 1e6:.2f} M parameters"]
    facts += [f"images of {height}x{width} pixels and {channels} channel{'s' * (channels > 1)}"]
    facts += [f"{len(names)} classes"] if names else []
    return title, ", ".join([*facts, f"{pipeline.scheduler.config.num_train_timesteps} timesteps"])


class Controls:
    """The controls of a page, which several tabs have."""

    def __init__(self, pipeline, steps: int):
        self.pipeline, self.default_steps, self.names = pipeline, steps, class_names(pipeline)
        self.timesteps = pipeline.scheduler.config.num_train_timesteps

    def images(self, most: int, value: int, least: int = 1):
        return gr.Slider(least, most, value, step=1, label="Images")

    def steps(self):
        return gr.Slider(1, self.timesteps, self.default_steps, step=1, label="Steps")

    def seed(self, label: str, value: int):
        with gr.Row(elem_classes="seed"):
            seed = gr.Number(value, label=label, precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120)
            button = gr.Button("Random seed", size="sm", min_width=120)
        button.click(None, None, seed, js=f"() => Math.floor(Math.random() * {LARGEST_SEED})")
        return seed

    def class_label(self, label: str, *more: tuple[str, int]):
        choices = [*more, *((name, k) for k, name in enumerate(self.names))]
        return gr.Dropdown(choices, label=label, visible=bool(self.names))

    def guidance(self):
        info = "1 disables it; 0 ignores the class"
        return gr.Slider(0, 8, 1, step=0.5, label="Guidance", info=info, visible=bool(self.names))

    def sampling(self, most: int, number: int) -> list:
        own = f"its own: {type(self.pipeline.scheduler).__name__}"  # a longer text is cut off on a telephone
        settings = [
            self.images(most, number),
            gr.Dropdown([(own, OWN), *scheduler_class(self.pipeline.scheduler.config).solvers], label="Solver"),
        ]
        settings += [self.steps(), self.seed("Seed", 0), self.class_label("Class", ("each in turn", EACH))]
        return [*settings, self.guidance()]

    @staticmethod
    def picture(label: str, alt_text: str, value=None):
        given = {"format": "png", "image_mode": None, "buttons": ["download", "fullscreen"], "type": "filepath"}
        return gr.Image(value, label=label, alt_text=alt_text, interactive=False, elem_classes="picture", **given)

    @staticmethod
    def start_and_stop(words: str, drawings: Drawings, draw, expected, settings: list, shown: list) -> None:
        """A button that draws, one that stops it, and between them the expected time or the steps done."""

        def expect(*settings) -> str:
            try:
                return expected(*settings)
            except ValueError as error:
                return html.escape(str(error), quote=False)

        status = gr.Markdown(expect(*(each.value for each in settings)), elem_classes="status")
        with gr.Row():
            start, stop = gr.Button(words, variant="primary"), gr.Button("Stop")
        handle = drawings.handler(draw, expected, len(shown))
        one_of_many = {"concurrency_limit": SIDE_BY_SIDE, "concurrency_id": "drawings"}
        press = start.click(handle, settings, [*shown, status], show_progress_on=status, **one_of_many)
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        stop.click(lambda: "Stopped.", None, status, cancels=press, **quick)
        gr.on([each.change for each in settings], expect, settings, status, trigger_mode="always_last", **quick)


def build_demo(pipeline: DDPMCustomPipeline) -> gr.Blocks:
    """Draw the first samples, and build the page of a model, for `launch`.

    Transparent images are shown on a checkerboard, and images of bands as one gray image per band.
    """
    title, facts = _describe(pipeline)
    number, steps, pace, (first, told) = open_with_samples(pipeline)
    on, drawings, folder = Controls(pipeline, steps), Drawings(), tempfile.TemporaryDirectory()

    def samples(*settings, **more):
        return draw_samples(own_copy(pipeline), *settings, **more)

    def interpolation(*settings, **more):
        return draw_interpolation(own_copy(pipeline), *settings, **more)

    def film(*settings, **more):
        return draw_film(folder, own_copy(pipeline), *settings, **more)

    def time_of_samples(number, solver, steps, seed, label, guidance_scale, of=None):
        return pace.sentence(number, steps, solver, guidance_scale)

    def time_of_interpolation(method, number, steps, t, *others):
        return pace.sentence(number + 2 * (method == "mix"), steps, guidance_scale=others[-1])

    with Page(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        what = "A denoising diffusion probabilistic model: each step removes some noise until an image remains."
        gr.Markdown(f"# {html.escape(title)}\n{what}  \n{facts}.")
        with gr.Tab("Samples"), gr.Row():
            with gr.Column(scale=2):
                shown = [on.picture("Samples", f"Samples of {title} in a grid", first), gr.Markdown(told)]
            with gr.Column():
                on.start_and_stop("Draw samples", drawings, samples, time_of_samples, on.sampling(64, number), shown)
        with gr.Tab("Interpolation"):
            alt = f"Images between two samples of {title}, in a row"
            shown = [on.picture("Images between images", alt), gr.Markdown()]
            with gr.Row():
                settings = [gr.Radio(["mix", "slerp"], value="mix", label="Method"), on.images(16, 9, least=2)]
                T = on.timesteps
                settings += [on.steps(), gr.Slider(0, T - 1, T // 2, step=1, label="Timestep of the mix")]
            with gr.Row():
                settings += [on.seed("First seed", 0), on.seed("Last seed", 1)]
                settings += [on.class_label("First class"), on.class_label("Last class"), on.guidance()]
            on.start_and_stop("Interpolate", drawings, interpolation, time_of_interpolation, settings, shown)
        with gr.Tab("Film"), gr.Row():
            with gr.Column(scale=2):
                shown = [on.picture("Film", f"A film of samples of {title}, from noise to images")]
                alt = f"Samples of {title}, a row each, from noise on the left to images on the right"
                shown += [on.picture("Contact sheet", alt), gr.Markdown()]
            with gr.Column():
                whats = [("noisy images x_t", "samples"), ("predicted images x_0", "pred_original_samples")]
                settings = [*on.sampling(8, 4), gr.Radio(whats, value="samples", label="Show")]
                on.start_and_stop("Make a film", drawings, film, time_of_samples, settings, shown)
    return page.queue(max_size=WAITING, api_open=False)


def _theme() -> gr.themes.Base:
    """Gradio's theme with texts of a contrast of 4.5 or more, and without fonts of other hosts."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gr.themes.Default(primary_hue="indigo", **fonts)
    fill = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    light = dict.fromkeys(("body_text_color_subdued", "block_info_text_color"), "*neutral_600")
    dark = {f"{name}_dark": "*neutral_300" for name in light} | {f"{name}_dark": fill[name] for name in fill}
    return theme.set(color_accent="*primary_600", **fill, **light, **dark)


def launch(page: gr.Blocks, **where) -> str:
    """Serve the page, which makes no request to other hosts; `where`: arguments of `gr.Blocks.launch`."""
    return page.launch(
        theme=_theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,  # server-side rendering would need Node.js
        enable_monitoring=False,
        state_session_capacity=100,  # a session takes a third of a MiB
        app_kwargs={"middleware": [Middleware(Limits)]},
        **where,
    )[1]


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serve the page in background threads, and return its address."""
    return launch(page, server_name=host, server_port=port, prevent_thread_lock=True, quiet=True)
