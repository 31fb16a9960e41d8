import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.utils.pictures import Film, save_film


def filmed(channels=1, steps=None, **settings):
    pipeline = DDPMCustomPipeline(tiny_unet(in_channels=channels, sample_size=(8, 12)), LinearNoiseScheduler())
    pipeline.set_progress_bar_config(disable=True)
    film = Film(steps)
    settings = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 5} | settings
    images = pipeline(3, callback_on_step_end=film, output_type="latent", **settings).images
    return film, images, pipeline


def test_a_film_is_the_trajectory():
    """Against the walk written out."""
    film, images, pipeline = filmed()
    assert film.samples.shape == film.pred_original_samples.shape == (5, 3, 1, 8, 12)
    assert film.timesteps == [800, 600, 400, 200, 0]
    assert_close(film.samples[-1], images)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 8, 12, generator=generator)
    for k, t in enumerate((800, 600, 400, 200, 0)):
        with torch.no_grad():
            output = pipeline.unet(x, t).sample
        step = pipeline.scheduler.step(output, t, x, generator)
        x = step.prev_sample
        assert_close(film.samples[k], x, rtol=1e-4, atol=1e-5)
        assert_close(film.pred_original_samples[k], step.pred_original_sample, rtol=1e-4, atol=1e-5)
    pipeline(1, num_inference_steps=2, callback_on_step_end=film)
    assert film.timesteps == [500, 0]  # of the last call


def test_chosen_steps_only():
    film, images, _ = filmed(steps=(0, 4))
    assert film.timesteps == [800, 0]
    assert_close(film.samples[-1], images)


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc", "deis", "heun", "euler"])
def test_every_solver_tells_the_x0_that_it_assumed(solver):
    film, images, _ = filmed(scheduler=solver, num_inference_steps=10)
    assert film.pred_original_samples.isfinite().all()
    assert_close(film.pred_original_samples[-1].clamp(-1, 1), images.clamp(-1, 1), rtol=0, atol=0.2)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB"), (5, "L")])
def test_contact_sheets_and_films_of_any_channels(tmp_path, channels, mode):
    film, _, _ = filmed(channels)
    sheet = film.contact_sheet(scale=2)
    assert sheet.mode == mode
    assert sheet.width > 5 * 24 * (5 if channels == 5 else 1)  # band beside band
    assert sheet.height > 3 * 16
    large = film.contact_sheet("pred_original_samples")
    assert large.width > 5 * 60 * (5 if channels == 5 else 1)
    for suffix in ("gif", "webp"):
        film.save(tmp_path / f"film.{suffix}", scale=2)
        assert Image.open(tmp_path / f"film.{suffix}").n_frames == 5


def test_mp4(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    film, _, _ = filmed(3)
    film.save(tmp_path / "film.mp4", scale=3, seconds=2)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    size = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(size[1], size[0], 3) for frame in reader]
    assert size == (
        2 * 36 + 3 * 6,
        2 * 24 + 3 * 6 + 17 + 6 + 1,
    )  # 2 x 2 images with gaps of 6, a line of text, an even height
    assert len(frames) == 5 + 5  # and two seconds on the last
    first = film.samples[0, 0].clamp(-1, 1).add(1).mul(127.5).movedim(0, -1).numpy().repeat(3, 0).repeat(3, 1)
    assert (
        abs(frames[0][-24 - 6 - 24 - 6 - 1 : -24 - 6 - 6 - 1, 6 : 6 + 36].astype(float) - first).mean() < 40
    )  # compressed


def test_betas_that_ours_cannot_have_are_filmed_too():
    pipeline = DDPMCustomPipeline(tiny_unet(), diffusers.DDPMScheduler(beta_schedule="sigmoid"))
    pipeline.set_progress_bar_config(disable=True)
    film = Film()
    pipeline(num_inference_steps=3, callback_on_step_end=film)
    assert film.pred_original_samples.shape == (3, 1, 1, 8, 8)


def test_films_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the film has no frames yet"):
        Film().contact_sheet()
    film = Film()
    film(None, 0, 999, {"sample": torch.zeros(1, 1, 4, 4), "pred_original_sample": None})
    assert len(film.samples) == 1
    with pytest.raises(ValueError, match="pred_original_samples: the film has no frames yet, or the scheduler does"):
        film.contact_sheet("pred_original_samples")
    film, _, _ = filmed()
    with pytest.raises(ValueError, match="of='x0'; choose from samples, pred_original_samples"):
        film.contact_sheet("x0")
    with pytest.raises(ValueError, match="film.avi' must be the name of a film, with one of the suffixes .gif"):
        save_film([Image.new("L", (4, 4))], tmp_path / "film.avi")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs `pip install ddpm-hf\[film\]`"):
        film.save(tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


def test_frames_that_are_not_finite_make_no_film(tmp_path):
    film = Film()
    for value in (0.0, torch.nan):
        film(
            None,
            len(film.timesteps),
            5,
            dict.fromkeys(("sample", "pred_original_sample"), torch.full((2, 1, 4, 4), value)),
        )
    for of in ("samples", "pred_original_samples"):
        with pytest.raises(ValueError, match="the samples are not finite: 2 of 2 images hold NaN or infinities"):
            film.save(tmp_path / "film.gif", of)
        with pytest.raises(ValueError, match="the samples are not finite"):
            film.contact_sheet(of)
    assert not (tmp_path / "film.gif").exists()
