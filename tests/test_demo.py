"""The page of `ddpm-hf demo`: what is behind it, and the page itself in a browser."""

import asyncio
import errno
import functools
import gc
import json
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_unet
from PIL import Image
from selenium import webdriver
from selenium.common import StaleElementReferenceException
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands import demo_drawing, demo_server
from ddpm_hf.commands.demo import free_port
from ddpm_hf.commands.demo_drawing import (
    EACH,
    OWN,
    Pace,
    draw_film,
    draw_interpolation,
    draw_samples,
    open_with_samples,
)
from ddpm_hf.commands.demo_page import build_demo, serve
from ddpm_hf.commands.demo_server import LONGEST_BODY, WAITING, Drawings
from ddpm_hf.commands.main import main
from ddpm_hf.hub.space import space_files
from ddpm_hf.utils.seeds import image_generators, seeded_generator


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(**settings):
    return quiet(DDPMCustomPipeline(tiny_unet(**settings), LinearNoiseScheduler()))


@pytest.fixture(scope="module")
def digits(digits_model):
    return quiet(DDPMCustomPipeline.from_pretrained(digits_model))


def cells(picture, columns, height=8, width=8):
    """The images in a picture, (N, H, W) of 0 ... 255, at their own size: one of each block of equal pixels."""
    pixels = np.asarray(picture).astype(int)
    side = max(height, width)  # gaps and margins are a sixth of it

    def taken(scale):
        return columns * (width * scale + round(scale * side / 6)) + round(scale * side / 6)

    scale = next(scale for scale in range(1, 200) if taken(scale) == pixels.shape[1])
    gap = round(scale * side / 6)
    found = []
    pitch = height * scale + gap
    first = (pixels.shape[0] - gap) % pitch + gap  # below the names of the columns, if there are any
    for top in range(first, pixels.shape[0] - gap, pitch):
        for left in range(gap, pixels.shape[1] - gap, width * scale + gap):
            image = pixels[top : top + height * scale, left : left + width * scale]
            blocks = image.reshape(height, scale, width, scale)
            assert (blocks == blocks[:, :1, :, :1]).all()  # crisp
            found.append(blocks[:, 0, :, 0])
    assert scale > 1
    return np.stack(found)


def levels(images):
    """(N, H, W, 1) in [0, 1] -> (N, H, W) of 0 ... 255."""
    return (np.asarray(images)[..., 0] * 255).round().astype(int)


def assert_alike(a, b):
    """Batches of another size may round another way."""
    assert a.shape == b.shape
    assert abs(a - b).max() <= 1


def test_samples_are_the_pipelines_and_those_of_the_command_that_is_told(digits, tmp_path, monkeypatch):
    steps = []
    picture, told = draw_samples(digits, 6, "ddim", 5, 7, EACH, 2.0, progress=steps.append)
    made = digits(
        generator=image_generators(7, range(6)),
        class_labels=range(6),
        guidance_scale=2,
        scheduler="ddim",
        num_inference_steps=5,
        output_type="np",
    ).images
    assert_alike(cells(picture, 3), levels(made))
    assert steps == [(k, 5) for k in range(1, 6)]
    seconds, command = re.fullmatch(r"([\d.]+) s\. The same images as files:\n```\n(ddpm-hf .*)\n```", told).groups()
    assert 0 < float(seconds) < 60
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[1:], "--output_dir", "samples"]) == 0
    files = sorted(Path("samples").glob("[0-9]*.png"))
    assert_alike(np.stack([np.asarray(Image.open(path)).astype(int) for path in files]), levels(made))


def test_one_class_and_the_models_own_solver(digits):
    picture, told = draw_samples(digits, 4, OWN, 3, 0, 5, 1)
    made = digits(4, image_generators(0, range(4)), 3, "np", class_labels="5").images
    assert_alike(cells(picture, 2), levels(made))
    assert told.endswith("--num_images 4 --seed 0 --num_inference_steps 3 --guidance_scale 1 --class_labels 5\n```")


def test_an_arc_of_noise_goes_from_one_sample_to_another(digits):
    picture, _ = draw_interpolation(digits, "slerp", 5, 4, 0, 3, 8, 1, 7, 2)
    settings = {"scheduler": "ddim", "num_inference_steps": 4, "output_type": "np", "guidance_scale": 2}
    generators = image_generators(3, [0]) + image_generators(8, [0])
    ends = digits(2, generators, class_labels=[1, 7], **settings).images
    row = cells(picture, 5)
    assert_alike(row[[0, -1]], levels(ends))
    a, b = (torch.randn(1, 1, 8, 8, generator=each) for each in image_generators(3, [0]) + image_generators(8, [0]))
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    middle = (a + b) / (2 * torch.cos(angle / 2))
    assert_alike(row[2:3], levels(digits(latents=middle, class_labels=1, **settings).images))


def test_mixtures_stand_between_the_samples(digits):
    picture, _ = draw_interpolation(digits, "mix", 4, 5, 400, 3, 8, 1, 7, 1)
    settings = {"num_inference_steps": 5, "output_type": "np"}
    generators = image_generators(3, [0]) + image_generators(8, [0])
    a, b = digits(2, generators, class_labels=[1, 7], **settings).images
    again = seeded_generator(3, "interpolation", 8)
    between = digits.interpolate(a, b, 400, 4, generator=again, class_labels=[1, 1, 7, 7], **settings).images
    assert_alike(cells(picture, 6), levels([a, *between, b]))


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield SimpleNamespace(name=name)


@pytest.mark.parametrize(("solver", "frames"), [(OWN, 30), ("heun", 40)])  # of 30 and 59
def test_a_film_ends_with_the_samples(digits, folder, solver, frames):
    settings = (digits, 3, solver, 30, 7, EACH, 2)
    samples = cells(draw_samples(*settings)[0], 2)[:3]
    path, sheet, told = draw_film(folder, *settings, "samples")
    film, sheet = Image.open(path), cells(sheet, 10).reshape(3, 10, 8, 8)
    assert film.n_frames == frames
    assert re.fullmatch(rf"[\d.]+ s, {frames} frames\.", told)
    first = cells(film.convert("L"), 3)
    film.seek(frames - 1)
    assert_alike(cells(film.convert("L"), 3), samples)
    assert_alike(sheet[:, -1], samples)
    assert_alike(sheet[:, 0], first)
    seen = cells(draw_film(folder, *settings, "pred_original_samples")[1], 10).reshape(3, 10, 8, 8)
    assert abs(seen[:, 5] - samples).mean() < abs(sheet[:, 5] - samples).mean()  # it knows before it is there


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB"), (5, "L")])
def test_any_channels_are_shown(folder, channels, mode):
    pipeline = pipeline_of(in_channels=channels, sample_size=(8, 12))
    picture, _ = draw_samples(pipeline, 4, OWN, 2, 0, EACH, 1)
    made = pipeline(4, image_generators(0, range(4)), 2, "np").images
    assert picture.mode == mode
    if channels in (1, 3):  # others are shown on a checkerboard, or as bands: see test_pictures.py
        assert_alike(cells(picture.getchannel(0), 2, width=12), levels(made))
    assert Image.open(draw_film(folder, pipeline, 2, OWN, 3, 0, EACH, 1, "samples")[0]).n_frames == 3
    assert draw_interpolation(pipeline, "mix", 3, 4, 500, 0, 1, None, None, 1)[0].mode == mode


def presses(page):
    """The handlers of the three buttons that draw."""
    return [each for each in page.fns.values() if each.concurrency_id == "drawings"]


def answers(handle, *settings, session="nobody"):
    """All that a handler sends to the page."""

    async def collect():
        return [answer async for answer in handle(SimpleNamespace(session_hash=session), *settings)]

    return asyncio.run(collect())


def components(page):
    return [component["props"] for component in page.get_config_file()["components"]]


def test_the_page_tells_the_model_and_asks_for_what_it_can_be_asked(digits, digits_model):
    page, other = build_demo(digits), build_demo(pipeline_of(in_channels=3))
    assert (page.title, other.title) == (digits_model.name, "A model")
    assert any("images of 8x8 pixels and 1 channel, 10 classes, 1000" in str(p.get("value")) for p in components(page))
    assert any("images of 8x8 pixels and 3 channels, 1000" in str(p.get("value")) for p in components(other))
    for made, asked in ((page, True), (other, False)):
        visible = [p["visible"] for p in components(made) if p.get("label") in ("Class", "First class", "Guidance")]
        assert visible == [asked] * 6
    assert not page.analytics_enabled
    assert len(presses(page)) == 3
    assert {press.concurrency_limit for press in presses(page)} == {4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4, OWN, 3, None, EACH, 1), "seed=None must be an integer in 0 ... 2^53 - 1"),
        ((4, OWN, 3, -1, EACH, 1), "seed=-1 must be an integer"),
        ((4, "pndm", 2, 0, EACH, 1), "num_inference_steps=2: PNDMScheduler takes 4 ... 1000 steps"),
        ((4, OWN, 3, 0, 11, 1), "11 is not a class; choose from labels 0 ... 9"),
    ],
)
def test_a_mistake_is_a_message_on_the_page(digits, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_samples(digits, *settings)
    with pytest.raises(gr.Error) as error:
        answers(presses(build_demo(digits))[0].fn, *settings)
    assert message in error.value.message
    assert not error.value.print_exception


def test_weights_that_are_not_finite_are_told_on_the_page(folder):
    pipeline = pipeline_of()
    pipeline.unet.stem.weight.data[0] = torch.nan
    for draw in (
        functools.partial(draw_samples, pipeline, 2, OWN, 2, 0, EACH, 1.0),
        functools.partial(draw_interpolation, pipeline, "mix", 2, 2, 500, 0, 1, 0, 0, 1.0),
        functools.partial(draw_interpolation, pipeline, "slerp", 2, 2, 500, 0, 1, 0, 0, 1.0),
        functools.partial(draw_film, folder, pipeline, 2, OWN, 2, 0, EACH, 1.0, "samples"),
    ):
        with pytest.raises(
            gr.Error, match="the samples are not finite: 2 of 2 .*weights are not finite: 1 of .*stem.weight"
        ):
            answers(Drawings().handler(draw, lambda: "soon", 2))
    assert not list(Path(folder.name).iterdir())


def test_the_page_opens_with_samples(digits, capfd):
    page = build_demo(digits)
    assert "Drawing 20 samples to open the page with: 100%" in capfd.readouterr().err
    (first,) = [p["value"] for p in components(page) if p.get("label") == "Samples" and p.get("value")]
    expected, _ = draw_samples(digits, 20, OWN, 50, 0, EACH, 1)
    assert_alike(cells(Image.open(first["path"]), 10), cells(expected, 10))
    assert any("ddpm-hf sample" in str(p.get("value")) for p in components(page))


@pytest.mark.parametrize(("seconds", "number", "steps"), [(0.0, 16, 50), (0.14, 4, 50), (0.55, 1, 50), (9.0, 1, 10)])
def test_a_slow_model_opens_with_fewer_samples(monkeypatch, seconds, number, steps):
    clock, drawn = [0.0], []

    def draw(pipeline, number, solver, steps, *others):
        clock[0] += steps * number * seconds + 1e-6
        drawn.append((number, steps))
        return "picture", "text"

    monkeypatch.setattr(demo_drawing, "draw_samples", draw)
    monkeypatch.setattr(demo_drawing.time, "perf_counter", lambda: clock[0])
    found = open_with_samples(pipeline_of())
    assert found[:2] == drawn[-1] == (number, steps)
    assert found[2].seconds(4, 10) == pytest.approx(40 * seconds, abs=1e-3)


def test_the_expected_time_is_told_and_limited():
    pace = Pace(step=0.01, image=0.002)
    assert pace.seconds(5, 100) == pytest.approx(2.0)
    assert pace.seconds(5, 100, guidance_scale=2) == pytest.approx(3.0)
    assert pace.seconds(5, 100, "heun") == pytest.approx(4.0)
    assert pace.sentence(5, 100, "ddim") == "5 images in 100 steps: about 2.0 s."
    with pytest.raises(ValueError, match="64 images in 1000 steps would take about 138 s here, .* at most 60 s"):
        pace.sentence(64, 1000)


def test_too_long_a_drawing_is_refused_before_it_starts():
    def expected():
        return Pace(step=1, image=1).sentence(64, 1000)

    with pytest.raises(gr.Error, match="choose fewer images or steps"):
        answers(Drawings().handler(pytest.fail, expected, 2))


class Slow:
    """A drawing of 600 steps of 10 ms, which counts them."""

    def __init__(self):
        self.steps, self.ended = 0, threading.Event()

    def __call__(self, progress):
        try:
            for self.steps in range(1, 601):
                time.sleep(0.01)
                progress((self.steps, 600))
            return "picture", "text"
        finally:
            self.ended.set()


def test_a_drawing_ends_between_steps_where_its_visitor_stops_or_leaves(caplog):
    slow = Slow()

    async def leave():
        handle = Drawings().handler(slow, lambda: "About 6 s.", 2)(SimpleNamespace(session_hash="someone"))
        told = [(await anext(handle))[-1] for _ in range(3)]
        await handle.aclose()  # as Gradio does for both
        await asyncio.sleep(0.3)
        return told

    told = asyncio.run(leave())
    assert told[0] == "About 6 s."
    assert re.fullmatch(r"Step \d+ of 600, \d s\. About 6 s\.", told[2])
    assert slow.ended.wait(1)
    assert slow.steps < 300
    gc.collect()
    assert not caplog.records  # asyncio would log how it ended, with a traceback


def test_a_drawing_ends_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(demo_server, "PATIENCE", 0.5)
    slow = Slow()
    assert all(answer[0] != "picture" for answer in answers(Drawings().handler(slow, lambda: "About 6 s.", 2)))
    assert slow.ended.wait(1)
    assert slow.steps < 300


def test_a_short_drawing_does_not_wait_for_a_long_one():
    slow, drawings = Slow(), Drawings()

    async def both():
        long = drawings.handler(slow, lambda: "About 6 s.", 2)(SimpleNamespace(session_hash="someone"))
        await anext(long), await anext(long)
        short = drawings.handler(lambda progress: ("picture", "text"), lambda: "Soon.", 2)
        found = [answer async for answer in short(SimpleNamespace(session_hash="another"))]
        running = not slow.ended.is_set()
        await long.aclose()
        return found[-1], running

    assert asyncio.run(both()) == (("picture", "text", "Soon."), True)


def test_drawings_side_by_side_are_those_of_one_after_another(digits):
    handles = [presses(build_demo(digits))[0].fn] * 3
    settings = [(5, solver, 20, seed, EACH, 2.0) for seed, solver in enumerate((OWN, OWN, "ddim"))]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda handle, each: answers(handle, *each)[-1][0], handles, settings))
    for picture, each in zip(found, settings, strict=True):
        assert_alike(cells(picture, 3), cells(draw_samples(digits, *each)[0], 3))


@pytest.fixture(scope="module")
def server(digits):
    page = build_demo(digits)
    yield serve(page, port=free_port("127.0.0.1", 0)) + "gradio_api/"
    page.close()


def working():
    """Whether a thread draws at the moment."""
    frames = sys._current_frames()
    drawing = [each.ident for each in threading.enumerate() if each.name.startswith("drawing")]
    return any("draw_samples" in "".join(traceback.format_stack(frames[ident])) for ident in drawing)


def post(url, data, kind="application/json"):
    """Status and text of the answer."""
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_files_and_long_requests_are_refused(server):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    for path in ("upload", "process_recording", "component_server"):
        assert post(server + path, part % b"0" * 10, "multipart/form-data; boundary=x") == (
            413,
            "This page takes no files.",
        )
    assert post(server + "upload", b"0", "text/plain")[0] == 413
    long = json.dumps({"session_hash": "s", "fn_index": 0, "data": ["0" * LONGEST_BODY]}).encode()
    code, text = post(server + "queue/join", long)
    assert (code, f"at most {LONGEST_BODY} bytes" in text) == (413, True)


def test_malformed_requests_leave_no_traceback(server, capfd):
    for data in (b"{", b"[]", b"{}", b"\xff", b'{"session_hash": "s", "fn_index": 99, "data": []}'):
        code, text = post(server + "queue/join", data)
        assert 400 <= code < 500
        assert text
    assert "Traceback" not in capfd.readouterr().err


NOT_OFFERED = "The settings are not those that this page asks for."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([1, OWN, 1001, 0, EACH, 1], "Value 1001 is greater than maximum value 1000."),
        ([1, "rk4", 5, 0, EACH, 1], "is not in the list of choices"),
        (["one", OWN, 5, 0, EACH, 1], NOT_OFFERED),
        ([1, OWN, 5, {"path": "/etc/passwd"}, EACH, 1], NOT_OFFERED),
        ([1, OWN], NOT_OFFERED),
        ([None, OWN, 5, 0, EACH, 1], NOT_OFFERED),
    ],
)
def test_settings_that_the_page_does_not_offer_are_one_sentence(digits, settings, message, capfd):
    page = build_demo(digits)
    with pytest.raises(gr.Error, match=re.escape(message)) as error:
        asyncio.run(page.process_api(presses(page)[0], settings, state=page.state_holder["someone"]))
    assert not error.value.print_exception  # else Gradio prints a traceback


def test_the_queue_has_a_limit_and_forgets_who_does_not_listen(server, monkeypatch):
    monkeypatch.setattr(demo_server, "PATIENCE", 0.5)

    def join(k):
        body = {"session_hash": f"s{k}", "fn_index": 1, "data": [32, OWN, 1000, 0, EACH, 1]}
        return post(server + "queue/join", json.dumps(body).encode())[0]

    with ThreadPoolExecutor(1) as threads:
        codes = list(threads.map(join, range(WAITING + 40)))
    assert set(codes) == {200, 503}
    assert codes[:WAITING] == [200] * WAITING
    for _ in range(600):
        if json.load(urllib.request.urlopen(server + "queue/status"))["queue_size"] == 0 and not working():
            break
        time.sleep(0.1)
    else:
        pytest.fail("drawings went on that nobody waited for")


def test_what_the_command_refuses(digits_model, monkeypatch, capfd):
    def refused(*words):
        assert main(["demo", *words]) == 2
        *before, error = capfd.readouterr().err.splitlines()
        assert before in ([], [f"Loading {words[0]}"])
        return error

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"host='127.0.0.1', port={port}: the server can't listen there: [Errno {errno.EADDRINUSE}]"
        assert message in refused(str(digits_model), "--port", str(port))
    assert "port=70000: the server can't listen there" in refused(str(digits_model), "--port", "70000")
    assert "model='./nowhere' can't be loaded" in refused("./nowhere")
    assert "unknown flag '--share'" in refused(str(digits_model), "--share")
    monkeypatch.delitem(sys.modules, "ddpm_hf.commands.demo_page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "`pip install ddpm-hf[demo]`" in refused(str(digits_model))


def test_a_space_of_the_hub_shows_the_same_page(digits_model, tmp_path, monkeypatch):
    files = space_files("someone/digits")
    assert sorted(files) == ["README.md", "app.py", "requirements.txt"]
    _, card, rest = files["README.md"].split("---\n")
    assert yaml.safe_load(card) == {
        "title": "digits",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "app_file": "app.py",
        "models": ["someone/digits"],
    }
    assert not rest
    assert files["requirements.txt"] == f"ddpm-hf[demo]=={metadata.version('ddpm-hf')}\n"
    monkeypatch.chdir(tmp_path)
    Path("app.py").write_text(files["app.py"])
    Path("someone").mkdir()
    Path("someone/digits").symlink_to(digits_model)
    launched = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **settings: launched.append((page, settings)) or ("", "", ""))
    runpy.run_path("app.py")
    ((page, settings),) = launched
    assert len(presses(page)) == 3
    assert settings["app_kwargs"]["middleware"][0].cls is demo_server.Limits
    assert not settings["share"]
    with pytest.raises(ValueError, match="Repo id must"):
        space_files("some one/digits")


@pytest.fixture
def served(digits_model):
    """The address of the real command's page."""
    command = [sys.executable, "-m", "ddpm_hf", "demo", str(digits_model), "--port", "0"]
    # A shell that runs the tests in the background has its children ignore Ctrl-C, unless they are told otherwise.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeding)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield re.fullmatch(rf"{digits_model} -> (http://127\.0\.0\.1:\d+/) \(press Ctrl-C to stop\)\n", line)[1]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()


def find_browser():
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.fail("there is no chromium or no chromedriver: `apt-get install chromium chromium-driver`")
    return paths


@pytest.fixture
def browser(tmp_path):
    chromium, driver_path = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


class Page:
    """The hands and eyes of who looks at it."""

    def __init__(self, driver):
        self.driver = driver

    def wait(self, condition):
        return WebDriverWait(self.driver, 120, ignored_exceptions=[StaleElementReferenceException]).until(
            lambda driver: condition()
        )

    def seen(self, selector):
        return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

    def one(self, selector, text=None):
        return self.wait(lambda: [each for each in self.seen(selector) if text in (None, each.text.strip())])[0]

    def click(self, selector, text=None):
        self.wait(lambda: [self.one(selector, text).click()])  # again, where it was drawn anew meanwhile

    def choose(self, label, option):
        self.click(f"input[aria-label='{label}']")
        self.click(f"[role=option][aria-label='{option}']")
        self.wait(lambda: self.one(f"input[aria-label='{label}']").get_attribute("value") == option)

    def type(self, label, number):
        field = self.one(f"input[type=number][aria-label$='{label}']")
        field.clear()
        field.send_keys(str(number), Keys.TAB)

    def pictures(self):
        return [image.get_attribute("src") for image in self.seen(".picture img")]

    def press(self, button, number=1):
        """The pictures, as files are, that there are `number` of after the button was pressed."""
        before = self.pictures()
        self.click("button.primary", button)
        found = self.wait(lambda: len(now := self.pictures()) == number and not set(now) & set(before) and now)
        return [Image.open(BytesIO(urllib.request.urlopen(url).read())) for url in found]

    def hosts(self):
        """Whom the page has asked for anything."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        asked += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
        urls = [urlsplit(url) for url in asked]
        return {url.hostname for url in urls if url.scheme in ("http", "https", "ws", "wss")}


@pytest.mark.slow
def test_the_page_in_a_browser(served, digits, digits_model, browser, tmp_path):
    page = Page(browser)
    browser.get(served)
    page.choose("Class", "7")
    for label, number in (("Images", 4), ("Steps", 6), ("Seed", 11), ("Guidance", 2)):
        page.type(label, number)
    (picture,) = page.press("Draw samples")
    expected, told = draw_samples(digits, 4, OWN, 6, 11, 7, 2)
    assert_alike(cells(picture, 2), cells(expected, 2))
    assert browser.title == digits_model.name
    assert page.one("pre").text.strip() == told.split("```")[1].strip()

    page.choose("Solver", "pndm")
    page.type("Steps", 2)
    page.click("button.primary", "Draw samples")
    message = page.one("[data-testid=toast-body]").text
    assert "num_inference_steps=2: PNDMScheduler takes 4 ... 1000 steps" in message
    assert "Traceback" not in message

    page.click("button[role=tab]", "Interpolation")
    page.click("label", "slerp")
    for label, number in (("Images", 5), ("Steps", 6), ("Last seed", 4)):
        page.type(label, number)
    page.choose("Last class", "3")
    (picture,) = page.press("Interpolate")
    expected, _ = draw_interpolation(digits, "slerp", 5, 6, 500, 0, 4, 0, 3, 1)
    assert_alike(cells(picture, 5), cells(expected, 5))

    page.click("button[role=tab]", "Film")
    page.type("Steps", 6)
    film, sheet = page.press("Make a film", 2)
    assert (film.format, film.n_frames) == ("WEBP", 6)
    film.seek(5)
    samples = cells(draw_samples(digits, 4, OWN, 6, 0, EACH, 1)[0], 2)
    assert_alike(cells(film.convert("L"), 4), samples)
    assert_alike(cells(sheet, 6)[5::6], samples)

    browser.save_screenshot(tmp_path / "film.png")
    assert Image.open(tmp_path / "film.png").width == 1280
    assert page.hosts() == {"127.0.0.1"}


# The texts whose contrast with their background (WCAG 2, 1.4.3) is less than 4.5
TOO_FAINT = """
const light = c => c.slice(0, 3).reduce((sum, v, k) => sum + [0.2126, 0.7152, 0.0722][k] *
    ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4), 0.05)
const colour = text => { const c = text.match(/[0-9.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c }
const behind = e => { for (; e; e = e.parentElement) {
    const c = colour(getComputedStyle(e).backgroundColor); if (c[3] == 1) return c } return [255, 255, 255] }
const words = e => e.type == 'number' ? e.value :
    [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join('')
return [...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && words(e).trim()).filter(e => {
    const [a, b] = [light(colour(getComputedStyle(e).color)), light(behind(e))]
    return Math.max(a, b) / Math.min(a, b) < 4.5 }).map(words)
"""


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_can_be_read_on_a_telephone(served, browser, theme):
    page = Page(browser)
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"{served}?__theme={theme}")
    for tab, button in (("Samples", "Draw samples"), ("Interpolation", "Interpolate"), ("Film", "Make a film")):
        page.click("button[role=tab]", tab)
        shown = page.one("button.primary", button)
        assert shown.rect["x"] + shown.rect["width"] <= 390
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.execute_script(TOO_FAINT) == []
        assert all(image.get_attribute("alt") for image in page.seen("img"))


@pytest.mark.slow
def test_stop_and_a_random_seed_in_a_browser(served, browser):
    page = Page(browser)
    browser.get(served)
    before = page.wait(page.pictures)  # samples are there
    seed = page.one("input[type=number][aria-label$='Seed']")
    assert seed.get_attribute("value") == "0"
    page.click("button", "Random seed")
    page.wait(lambda: seed.get_attribute("value") not in ("", "0"))
    for label, number in (("Images", 64), ("Steps", 500)):
        page.type(label, number)
    page.wait(lambda: "64 images in 500 steps: about" in page.one(".status").text)
    page.click("button.primary", "Draw samples")
    page.wait(lambda: re.match(r"Step [1-9]\d* of 500, \d+ s\.", page.one(".status").text))
    page.click("button", "Stop")
    page.wait(lambda: page.one(".status").text == "Stopped.")
    time.sleep(2)
    assert page.one(".status").text == "Stopped."
    assert page.pictures() == before
    for label, number in (("Images", 1), ("Steps", 2)):
        page.type(label, number)
    assert len(page.press("Draw samples")) == 1


def test_without_a_browser_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None if name == "chromedriver" else f"/usr/bin/{name}")
    with pytest.raises(pytest.fail.Exception, match="no chromedriver: `apt-get install chromium chromium-driver`"):
        find_browser()
