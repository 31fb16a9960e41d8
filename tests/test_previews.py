"""Samples drawn while training: the same however they are made, within their time, and never the end of a run."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import calls, tiny_config
from numpy.testing import assert_allclose
from PIL import Image

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.training import previews, train
from ddpm_hf.training.pictures import draw_data, draw_pictures
from ddpm_hf.training.previews import Previews, sample_together


def quiet(folder) -> DDPMCustomPipeline:
    pipeline = DDPMCustomPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_image_does_not_depend_on_the_others(trained):
    five, nine = (sample_together(Accelerator(), quiet(trained), n, 4, seed=7) for n in (5, 9))
    assert five.shape == (1, 5, 8, 8, 1)
    assert_allclose(nine[:, :5], five, atol=1e-5)
    assert np.abs(nine[0, 0] - nine[0, 1]).max() > 0.1
    assert np.abs(sample_together(Accelerator(), quiet(trained), 5, 4, seed=8) - five).max() > 0.1


def test_frames_lead_to_the_samples(trained):
    film = sample_together(Accelerator(), quiet(trained), 3, 6, seed=7, frame_steps=(0, 2, 5))
    assert film.shape == (4, 3, 8, 8, 1)
    assert_allclose(film[-2], film[-1], atol=1e-6)  # after step 5, the last, nothing comes
    assert np.abs(film[0] - film[-1]).max() > 0.1


class NarrowPipeline:
    """Has room for two images at a time."""

    def __init__(self, pipeline, error):
        self.pipeline, self.error, self.tried = pipeline, error, []

    def __call__(self, batch_size, **settings):
        self.tried.append(batch_size)
        if batch_size > 2:
            raise self.error
        return self.pipeline(batch_size, **settings)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        MemoryError(),
    ],
    ids=["CUDA", "CPU", "Python"],
)
def test_batches_are_halved_until_they_fit(trained, error):
    narrow = NarrowPipeline(quiet(trained), error)
    samples = sample_together(Accelerator(), narrow, 7, 3, seed=1, frame_steps=(1,))
    assert narrow.tried == [7, 4, 2, 2, 2, 1]
    assert_allclose(samples, sample_together(Accelerator(), quiet(trained), 7, 3, seed=1, frame_steps=(1,)), atol=1e-5)


def test_other_errors_are_not_taken_for_want_of_memory(trained):
    narrow = NarrowPipeline(quiet(trained), RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        sample_together(Accelerator(), narrow, 7, 3, seed=1)
    assert narrow.tried == [7]


def test_a_preview_that_fails_does_not_end_the_run(tmp_path, caplog):
    def fail(run):
        raise RuntimeError("no room\nat all")

    assert train(tiny_config(tmp_path), callbacks=[Previews(fail)]).finished
    assert "drawing samples at update 4 failed (RuntimeError: no room at all); training continues" in caplog.text


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def test_previews_keep_to_their_share_of_the_time(tmp_path, monkeypatch, caplog):
    """Updates of 1 s, a save every 100; a preview takes 30 s, and 20 are guessed."""
    clock, drawn = Clock(), []
    monkeypatch.setattr(previews, "time", clock)

    def draw(run):
        drawn.append(run.step)
        clock.now += 30
        return [{"value": run.step}]

    class Run:
        config = tiny_config(tmp_path, eval_batch_size=30, ddpm_num_inference_steps=10)
        accelerator = Accelerator()
        step, finished, log_history = 0, False, [{"images_per_second": 10.0}]

    run, share = Run(), Previews(draw)
    for run.step in range(100, 10_001, 100):
        clock.now += 100
        measured = share.on_evaluate(run)  # 2 * 30 * 10 / (3 * 10) = 20 s are guessed
        assert measured == ([{"value": run.step}] if drawn[-1:] == [run.step] else None)
    assert drawn[0] == 400  # 5 % of 400 s
    assert 0.045 < share.spent / clock.now <= 0.05
    assert caplog.text.count("no samples drawn at update") == 1
    before = len(drawn)
    for run.step in (10_100, 10_200):
        run.finished = run.step == 10_200
        share.on_evaluate(run)
    assert drawn[before:] == [10_200]
    none = Previews(draw)
    run.config.preview_time_share, run.finished = 0.0, False
    clock.now += 10_000
    none.on_evaluate(run)
    assert drawn[-1] == 10_200


def test_the_pictures_of_a_run(tmp_path):
    settings = {"max_train_steps": 6, "checkpointing_steps": 3, "preview_time_share": 0.99, "eval_batch_size": 16}
    seen, measured = [], []
    run = train(
        tiny_config(tmp_path, **settings),
        callbacks=[
            calls(on_init_end=draw_data),
            calls(on_save=lambda run: seen.append({path.name for path in tmp_path.glob("*.*[gf]")})),
            Previews(lambda run: measured.extend(draw_pictures(run))),
        ],
    )
    finished = {"data.png", "samples.png", "first_samples.png", "loss.png"}
    finished |= {"forward.png", "denoising.gif", "neighbours.png"}
    assert seen[-1] == finished
    assert [metric["type"] for metric in measured] == ["nearest_training_image"]
    assert [row["step"] for row in run.log_history] == [3, 6]
    if "samples.png" in seen[0]:  # it was in time
        assert "neighbours.png" not in seen[0]
    assert Image.open(tmp_path / "denoising.gif").n_frames == 3
    data = np.asarray(Image.open(tmp_path / "data.png"))
    assert data.shape[1] == 8 * 75 + 11
    stored = data[39 : 39 + 64, 11 : 11 + 64]
    assert len(np.unique(stored)) > 5
    assert {round(v / 255 * 16, 2) for v in np.unique(stored)} <= {
        k + d for k in range(17) for d in (0, 0.01, -0.01, 0.03, -0.03, 0.02, -0.02)
    }


def test_the_samples_of_classes_have_a_row_each(tmp_path, monkeypatch):
    asked = []
    sample = DDPMCustomPipeline.__call__

    def note(self, *args, **settings):
        asked.append((settings["class_labels"].tolist(), settings["guidance_scale"]))
        return sample(self, *args, **settings)

    monkeypatch.setattr(DDPMCustomPipeline, "__call__", note)
    settings = {"class_conditional": True, "guidance_scale": 3.0, "eval_batch_size": 25}
    train(tiny_config(tmp_path, **settings), callbacks=[Previews(draw_pictures)])
    two_each = [k // 2 for k in range(20)]
    assert asked == [(two_each, 3.0), (two_each, 3.0)]  # EMA and training weights
    picture = Image.open(tmp_path / "samples.png")
    above = picture.height - 10 * 75  # the title
    assert 11 < above < 50
    assert 2 * 75 + 11 + 8 < picture.width < 2 * 75 + 11 + 30  # and the names
    margin = np.asarray(picture.convert("L"))[above:, : picture.width - 2 * 75 - 1]
    assert all((margin[75 * k : 75 * k + 64] < 100).any() for k in range(10))


def test_each_class_is_drawn_however_few_images_are_asked_for(tmp_path):
    train(tiny_config(tmp_path, class_conditional=True, eval_batch_size=4), callbacks=[Previews(draw_pictures)])
    assert 0 < Image.open(tmp_path / "samples.png").height - 10 * 75 < 50


PROCESSES = """
import sys; sys.path.insert(0, {tests!r})
import numpy as np
import torch
from accelerate import Accelerator
from test_previews import quiet
torch.set_num_threads(1)
from ddpm_hf.training.previews import sample_together
accelerator = Accelerator()
assert accelerator.num_processes == 2
film = sample_together(accelerator, quiet({trained!r}), 5, 4, 7, (1,))
np.save(f"{out}/{{accelerator.process_index}}.npy", film)
if accelerator.process_index == 1:
    def broken(*args, **settings):
        raise RuntimeError("of one alone")
    pipeline = broken
else:
    pipeline = quiet({trained!r})
try:
    sample_together(accelerator, pipeline, 5, 4, 7)
except RuntimeError as error:
    open(f"{out}/{{accelerator.process_index}}.txt", "w").write(str(error))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_sample_together(trained, tmp_path):
    (tmp_path / "script.py").write_text(
        PROCESSES.format(tests=os.path.dirname(__file__), trained=str(trained), out=str(tmp_path))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "script.py"], check=True, env=environment, timeout=300)
    alone = sample_together(Accelerator(), quiet(trained), 5, 4, 7, (1,))
    for process in (0, 1):
        assert_allclose(np.load(tmp_path / f"{process}.npy"), alone, atol=1e-5)
        told = "of one alone" if process == 1 else "another process failed: RuntimeError: of one alone"
        assert (tmp_path / f"{process}.txt").read_text() == told
