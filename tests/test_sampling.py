"""`ddpm-hf sample`: folders of samples, and solvers side by side."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands import sample_comparison
from ddpm_hf.commands.main import main
from ddpm_hf.commands.sample_comparison import compare_solvers
from ddpm_hf.commands.sample_folder import SHARD, sample_to_folder
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.utils import pictures as films
from ddpm_hf.utils.seeds import image_generators

STEPS = ["--num_inference_steps", "5"]


def pipeline_of(**settings):
    pipeline = DDPMCustomPipeline(tiny_unet(**settings), LinearNoiseScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(folder, suffix="png"):
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob(f"[0-9]*.{suffix}"))}


def assert_alike(a, b):
    """Batches of another size may round another way."""
    assert a.keys() == b.keys()
    assert all(abs(a[name] - b[name]).max() <= 1 for name in a)


def test_the_command_fills_a_folder(digits_model, tmp_path, capsys):
    flags = ["--class_labels", "3", "7", "--guidance_scale", "2", "--scheduler", "ddim", *STEPS, "--num_images", "6"]
    assert main(["sample", str(digits_model), "--output_dir", str(tmp_path / "out"), *flags, "--seed", "5"]) == 0
    assert f"6 images generated -> {tmp_path / 'out'}" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == [*(f"{k:06d}.png" for k in range(6)), "grid.png", "sampling.json"]
    pipeline = DDPMCustomPipeline.from_pretrained(digits_model)
    settings = {"class_labels": [3, 7] * 3, "guidance_scale": 2, "scheduler": "ddim", "num_inference_steps": 5}
    expected = pipeline(generator=image_generators(5, range(6)), **settings).images
    assert_alike(pixels(tmp_path / "out"), {f"{k:06d}": np.asarray(im).astype(int) for k, im in enumerate(expected)})


def test_classes_whose_names_are_indices_of_others(tmp_path):
    """On the command line a word is a name; in a tensor a number is an index."""
    unet = tiny_unet(num_classes=3, class_names=["1", "2", "3"])
    unet.class_embedding.weight.data *= 3  # so that the classes of an untrained network differ
    pipeline = DDPMCustomPipeline(unet, LinearNoiseScheduler(num_train_timesteps=20))
    pipeline.save_pretrained(tmp_path / "model")
    for out, words in (("names", ["1", "2"]), ("and_index", ["1", "0"])):
        command = ["sample", str(tmp_path / "model"), "--output_dir", str(tmp_path / out), "--num_images", "2", *STEPS]
        assert main([*command, "--class_labels", *words]) == 0
    from ddpm_hf.utils.seeds import image_generators

    def drawn(labels):
        made = pipeline(generator=image_generators(0, range(2)), class_labels=labels, num_inference_steps=5).images
        return {f"{k:06d}": np.asarray(image).astype(int) for k, image in enumerate(made)}

    assert_alike(pixels(tmp_path / "names"), drawn(["1", "2"]))
    assert_alike(drawn(["1", "2"]), drawn(torch.tensor([0, 1])))
    assert_alike(pixels(tmp_path / "and_index"), drawn(torch.tensor([0, 0])))  # no class is called 0
    assert abs(drawn(torch.tensor([1, 2]))["000000"] - drawn(["1", "2"])["000000"]).max() > 1


def test_the_same_images_at_every_batch_size_and_in_two_processes(digits_model, tmp_path):
    command = [sys.executable, "-m", "ddpm_hf", "sample", str(digits_model), *STEPS]
    command += ["--num_images", "23", "--class_labels", "1", "2", "3"]
    folders = {name: tmp_path / name for name in ("one", "64", "two")}
    assert main([*command[3:], "--batch_size", "1", "--output_dir", str(folders["one"])]) == 0
    assert main([*command[3:], "--batch_size", "64", "--output_dir", str(folders["64"])]) == 0
    both = [
        subprocess.Popen(
            [*command, "--batch_size", "4", "--output_dir", folders["two"]],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [line.split()[0] for line in told] == ["12", "11"]  # each its part, and none twice
    for name in ("64", "two"):
        assert_alike(pixels(folders["one"]), pixels(folders[name]))


def test_only_what_is_missing_is_made(tmp_path):
    pipeline, made = pipeline_of(), []
    pipeline.unet.register_forward_hook(lambda _, args, out: made.append(len(args[0])))
    settings = {"num_inference_steps": 1, "batch_size": 4}
    assert sample_to_folder(pipeline, tmp_path, 10, **settings) == 10
    whole = pixels(tmp_path)
    for k in (0, 5, 6):
        (tmp_path / f"{k:06d}.png").unlink()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f".part-{socket.gethostname()}-{killed.pid}-000005.png").write_bytes(b"half an image")
    made.clear()
    assert sample_to_folder(pipeline, tmp_path, 12, **settings) == 5
    assert made == [1, 2, 2]
    again = pixels(tmp_path)
    assert len(again) == 12
    assert_alike({k: v for k, v in again.items() if k in whole}, whole)
    assert not list(tmp_path.glob(".*"))


def test_samples_go_into_the_folder_of_their_model(tmp_path, monkeypatch, capsys):
    """Two models do not share a folder. That of a model on the Hub has the name of its repository."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        pipeline_of().save_pretrained(f"runs/{name}")
        assert main(["sample", f"runs/{name}", "--num_images", "2", *STEPS]) == 0
        told = capsys.readouterr()
        assert told.out.splitlines() == [
            f"2 images generated -> runs/{name}/samples", f"runs/{name}/samples/grid.png"
        ]  # fmt: skip
        assert "steps" in told.err  # a bar within the batch
        assert len(pixels(tmp_path / f"runs/{name}/samples")) == 2
    DDPMCustomPipeline.from_pretrained("runs/a")  # is still a model
    monkeypatch.setattr("ddpm_hf.pipelines.pipeline.load_pipeline", lambda *_: pipeline_of())
    assert main(["sample", "user/model", "--num_images", "1", *STEPS, "--no_grid"]) == 0
    assert sorted(os.listdir("model/samples")) == ["000000.png", "sampling.json"]


def test_the_grid_has_a_column_for_each_class(digits_model, tmp_path, monkeypatch):
    """Without labels, the images take all classes in turn. The grid has names over its columns."""
    drawn = []
    monkeypatch.setattr("ddpm_hf.commands.sample_folder.grid",
                        lambda *args, has_alpha, **texts: drawn.append((args, texts)) or G)  # fmt: skip
    G = Image.new("L", (8, 8))
    command = ["sample", str(digits_model), *STEPS, "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--scale", "3"]) == 0
    (images, columns, scale), texts = drawn.pop()
    assert (len(images), columns, scale, texts) == (20, 10, 3, {"column_names": list("0123456789")})
    labels = json.loads((tmp_path / "out/sampling.json").read_text())["class_labels"]
    assert labels == list("0123456789")
    files = pixels(tmp_path / "out")
    assert all(abs(255 * image[..., 0] - files[f"{k:06d}"]).max() < 1e-6 for k, image in enumerate(images))
    assert main([*command[:-1], str(tmp_path / "3"), "--class_labels", "3", "--num_images", "5"]) == 0
    (images, columns, _), texts = drawn.pop()
    assert (len(images), columns, texts) == (5, 5, {"captions": ["3"] * 5})  # no empty columns
    monkeypatch.setattr("ddpm_hf.commands.sample_folder.MOST_COLUMNS", 4)
    command = [*command[:-1], str(tmp_path / "parquet"), "--format", "parquet", "--num_images", "12"]
    assert main(command) == 0
    (images, columns, scale), texts = drawn.pop()
    assert (len(images), columns, scale, texts) == (12, 8, None, {"captions": [*"0123456789", "0", "1"]})
    assert main([*command, "--scale", "0"]) == 2


@pytest.mark.parametrize(
    ("channels", "value_range", "suffix"),
    [(1, (0, 4095), "png"), (3, (100, 65535), "png"), (4, (0, 4095), "png"), (1, (-1024, 3071), "npy"),
     (2, (0, 1000), "png"), (5, (0, 10000), "npy"), (1, (0.0, 1.0), "npy"), (5, None, "npy"), (3, None, "png")],
)  # fmt: skip
def test_files_have_the_pixel_values_of_the_training_images(tmp_path, channels, value_range, suffix):
    """They can be training images again: the decoder gives what the model made."""
    pipeline = pipeline_of(in_channels=channels, value_range=value_range)
    pipeline.save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--num_images", "3", *STEPS]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").glob("[0-9]*"))
    assert [file.name for file in files] == [f"{k:06d}.{suffix}" for k in range(3)]
    assert (tmp_path / "out/grid.png").exists()
    expected = pipeline(3, image_generators(0, range(3)), 5, "np").images
    if channels in (2, 4):
        expected[..., :-1][expected[..., -1] < 0.5 / 65535] = 0  # the decoder reads no colour where nothing is opaque
    low, high = value_range or ((0, 1) if suffix == "npy" else (0, 255))
    decode = Decoder(channels=channels, value_range=None if suffix == "png" and not value_range else (low, high))
    for file, image in zip(files, expected):
        found = (decode(file).pixels.transpose(1, 2, 0).astype(float) - low) / (high - low)
        assert abs(found - image).max() <= (0.51 / min(high - low, 65535) if suffix == "png" else 1e-6)
    if suffix == "npy" and value_range:
        with pytest.raises(ValueError, match="format='png' holds .*: use npy"):
            sample_to_folder(pipeline, tmp_path / "again", 1, format="png")


@pytest.mark.slow
def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path):
    pipeline_of().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "ddpm_hf", "sample", "model", "--num_images", "600", "--batch_size", "5"]
    command += ["--num_inference_steps", "10", "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("out/[0-9]*.png"))) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    there = pixels(tmp_path / "out")
    assert 20 <= len(there) < 600
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    whole = pixels(tmp_path / "out")
    assert len(whole) == 600
    assert all(np.array_equal(whole[name], image) for name, image in there.items())


@pytest.mark.parametrize("round", range(5))
def test_several_at_once_in_one_folder_break_nothing(tmp_path, round):
    """Each fills the folder or says who does; in threads, which begin at the same moment."""
    settings = {"num_inference_steps": 2, "batch_size": 2, "num_images": 6}
    sample_to_folder(pipeline_of(), tmp_path / "alone", **settings)
    start = threading.Barrier(4)

    def sample(pipeline):
        start.wait()
        time.sleep(0.05 * round * random.random())
        try:
            return sample_to_folder(pipeline, tmp_path / "out", **settings)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        ends = [each.result() for each in [pool.submit(sample, pipeline_of()) for _ in range(4)]]
    in_use = (
        rf"{re.escape(str(tmp_path / 'out'))} is in use by .*: wait until it ends, stop it, or choose another folder"
    )
    made = [end for end in ends if isinstance(end, int)]
    assert all(isinstance(end, int) or re.fullmatch(in_use, end) for end in ends)
    assert sum(made) == 6
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "alone"))
    assert_alike(pixels(tmp_path / "out"), pixels(tmp_path / "alone"))


@pytest.mark.slow
def test_several_commands_at_once_in_one_folder_break_nothing(tmp_path):
    pipeline_of().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "ddpm_hf", "sample", "model", "--num_images", "60", "--batch_size", "2"]
    command += ["--num_inference_steps", "10", "--output_dir"]
    subprocess.run([*command, "alone"], cwd=tmp_path, check=True, capture_output=True)
    processes = [
        subprocess.Popen([*command, "out"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert any(status == 0 for _, _, status in ends)
    for _, errors, status in ends:
        last = errors.splitlines()[-1]
        assert status == 0 or (status == 2 and re.match(r"ddpm-hf: error: out is in use by process \d+ on ", last))
        assert "Traceback" not in errors
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "alone"))
    assert_alike(pixels(tmp_path / "out"), pixels(tmp_path / "alone"))


def test_parquet_is_a_data_set(digits_model, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.commands.sample_folder.SHARD", 10)
    pipeline = DDPMCustomPipeline.from_pretrained(digits_model)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"class_labels": ["3", 4], "num_inference_steps": 2, "batch_size": 4}
    assert sample_to_folder(pipeline, tmp_path / "parquet", 25, format="parquet", **settings) == 25
    assert sample_to_folder(pipeline, tmp_path / "png", 25, **settings) == 25
    files = sorted(map(str, (tmp_path / "parquet").glob("*.parquet")))
    assert [os.path.basename(f) for f in files] == [f"samples-{k:05d}.parquet" for k in range(3)]
    rows = datasets.Dataset.from_parquet(files)
    assert rows["label"] == [3, 4] * 12 + [3]
    assert rows.features["label"].names[3] == "3"
    assert_alike(
        {f"{k:06d}": np.asarray(image).astype(int) for k, image in enumerate(rows["image"])}, pixels(tmp_path / "png")
    )
    (tmp_path / "parquet/samples-00001.parquet").unlink()
    assert sample_to_folder(pipeline, tmp_path / "parquet", 27, format="parquet", **settings) == 12  # and the 5 kept
    assert sample_to_folder(pipeline, tmp_path / "png", 27, **settings) == 2
    images = {k: np.asarray(im).astype(int) for k, im in enumerate(datasets.Dataset.from_parquet(files)["image"])}
    assert_alike({f"{k:06d}": image for k, image in images.items()}, pixels(tmp_path / "png"))
    assert sample_to_folder(pipeline, tmp_path / "parquet", 9, format="parquet", **settings) == 0
    assert SHARD == 1000


def test_any_number_of_channels(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        folder = tmp_path / str(channels)
        pipeline = pipeline_of(in_channels=channels, sample_size=(4, 6))
        sample_to_folder(pipeline, folder, 1, num_inference_steps=1)
        assert (Image.open(folder / "000000.png").mode, Image.open(folder / "000000.png").size) == (mode, (6, 4))
    with pytest.raises(
        ValueError, match="format='png' holds gray or RGB, perhaps with alpha, and this model has 5 bands"
    ):
        sample_to_folder(pipeline_of(in_channels=5), tmp_path / "5", 1, format="png")
    sample_to_folder(pipeline_of(in_channels=5), tmp_path / "5", 1, num_inference_steps=1)
    assert np.load(tmp_path / "5/000000.npy").shape == (8, 8, 5)


MEMORY = """
import resource, sys; sys.path.insert(0, {tests!r})
from types import SimpleNamespace
from conftest import tiny_unet
from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.sample_folder import sample_to_folder
pipeline = DDPMCustomPipeline(tiny_unet(sample_size=48, in_channels=3), LinearNoiseScheduler())
pipeline.set_progress_bar_config(disable=True)
pipeline.unet.forward = lambda sample, timestep: SimpleNamespace(sample=0 * sample)
for n in (200, 3000):
    sample_to_folder(pipeline, {out!r} + str(n), n, batch_size=50, num_inference_steps=1, format={format!r})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    """2,800 images more would be 77 MB as floats."""
    script = MEMORY.format(tests=os.path.dirname(__file__), out=f"{tmp_path}/", format="npy")
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 25  # MB
    assert len(list((tmp_path / "3000").glob("*.npy"))) == 3000


def test_solvers_side_by_side(digits_model, tmp_path, capsys):
    flags = ["--compare", "--solvers", "ddpm", "ddim", "dpm++", "--steps", "2", "5", "--class_labels", "1", "8"]
    assert main(["sample", str(digits_model), "--output_dir", str(tmp_path), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "compare.png")
    picture = np.asarray(Image.open(tmp_path / "compare.png").convert("L"))
    row = len(picture) // 3
    assert len({picture[k * row : (k + 1) * row, -150:-20].tobytes() for k in range(3)}) == 3
    assert all((picture[k * row : (k + 1) * row, :40] < 100).any() for k in range(3))  # the names


def test_what_a_solver_cannot_do_is_an_empty_cell(tmp_path, caplog):
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(**zero))
    pipeline.set_progress_bar_config(disable=True)
    picture = compare_solvers(pipeline, ["pndm", "ddim", "unipc"], [3, 10])
    assert picture.height > 3 * 48
    assert "pndm with 3 steps is left out: scheduler='pndm' does not support the betas of this model" in caplog.text
    assert "ddim with 3 steps is left out: num_inference_steps=3: DDIMScheduler with timestep_spacing" in caplog.text


@pytest.mark.slow
def test_all_processes_of_a_launcher_take_part(tmp_path):
    pipeline_of().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577"]
    command += [
        "-m",
        "ddpm_hf",
        "sample",
        "model",
        "--num_images",
        "12",
        "--batch_size",
        "2",
        *STEPS,
        "--output_dir",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("6 images generated") == 2
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == 12


def test_comparing_begins_with_the_same_noise(capsys):
    pipeline, seen = pipeline_of(), []
    pipeline.unet.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    compare_solvers(pipeline, ["ddim", "dpm++"], [2], num_images=3)
    assert "0/2" in capsys.readouterr().err  # one bar for all cells
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[4])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_images", "0"], "num_images=0 must be an integer of at least 1"),
        (["--batch_size", "-2"], "batch_size=-2 must be an integer of at least 1"),
        (["--seed", "-1"], "seed=-1 must be an integer in 0 ... 9,223,372,036,854,775,807"),
        (["--format", "jpg"], "format='jpg' must be one of png, npy, parquet, or None"),
        (["--scheduler", "euler-b"], "scheduler='euler-b' must be one of ddpm, ddim"),
        (["--num_inference_steps", "2000"], "num_inference_steps=2000 must be an integer in 1 ... 1000"),
        (["--class_labels", "3"], "class_labels=[3]: this model is unconditional"),
        (["--guidance_scale", "2"], "guidance_scale=2.0: this model is unconditional"),
        (["--compare", "--solvers", "ddim", "magic"], "solvers: 'magic' is not a solver; choose from ddpm, ddim"),
        (["--nonsense"], "unknown flag '--nonsense'"),
        (
            ["--scheduler", "dpm++", "--num_inference_steps", "1000"],
            "num_inference_steps=1000: DPMSolverMultistepSched",
        ),
        (["--compare", "--format", "png"], "--format cannot be combined with --compare"),
        (["--steps", "5"], "--steps requires --compare"),
    ],
)
def test_commands_that_cannot_be(tmp_path, capsys, flags, message):
    pipeline_of().save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_kind_of_samples(tmp_path):
    pipeline = pipeline_of()
    sample_to_folder(pipeline, tmp_path / "out", 2, num_inference_steps=1)
    kept = json.loads((tmp_path / "out/sampling.json").read_text())
    assert len(kept.pop("model")) == 16
    assert kept == {
        "seed": 0, "format": "png", "class_labels": None, "num_inference_steps": 1, "clip_sample": None,
        "guidance_scale": 1.0, "scheduler": None,
    }  # fmt: skip
    main_settings = ["--num_inference_steps", "1", "--num_images", "3", "--output_dir", str(tmp_path / "out")]
    pipeline.save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), *main_settings]) == 0  # the command means the same
    with pytest.raises(ValueError, match="seed=1: .* holds samples made with seed=0; choose another folder"):
        sample_to_folder(pipeline, tmp_path / "out", 2, seed=1, num_inference_steps=1)
    with pytest.raises(
        ValueError,
        match="num_inference_steps=2: .* made with num_inference_steps=1; choose",
    ):
        sample_to_folder(pipeline, tmp_path / "out", 2, num_inference_steps=2)
    pipeline.unet.conv_out.bias.data += 1
    with pytest.raises(ValueError, match="model='[0-9a-f]{16}': .* holds samples made with model='[0-9a-f]{16}'"):
        sample_to_folder(pipeline, tmp_path / "out", 2, num_inference_steps=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="mine' holds other files: choose a folder that is empty or does not exist"):
        sample_to_folder(pipeline, tmp_path / "mine", 2)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


# ---------------------------------------------------------------- samples that are not finite


@pytest.mark.parametrize("flags", [STEPS, ["--compare", "--steps", "2"]])
def test_the_command_refuses_weights_that_are_not_finite(tmp_path, capsys, flags):
    pipeline = pipeline_of()
    pipeline.unet.stem.weight.data[0] = torch.nan
    pipeline.save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    told = capsys.readouterr().err
    assert "can't be loaded: " in told
    assert "weights are not finite: 1 of " in told
    assert " tensors have NaN or infinities, such as stem.weight (float32); load weights that are finite" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["png", "npy", "parquet"])
def test_samples_that_are_not_finite_leave_nothing_behind(tmp_path, monkeypatch, capsys, format):
    """The last line that the command prints is the error, not the bar."""
    pipeline = pipeline_of()

    def spoil(module, args, output):
        output.sample.fill_(torch.inf)

    pipeline.unet.register_forward_hook(spoil)
    monkeypatch.setattr("ddpm_hf.pipelines.pipeline.load_pipeline", lambda *_: pipeline)
    assert main(["sample", "model", "--output_dir", str(tmp_path / "out"), "--format", format, *STEPS]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(
        "ddpm-hf: error: the samples are not finite: 16 of 16 images hold NaN or infinities; all weig"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "left"), [("npy", ["000000.npy", "000001.npy", "sampling.json"]), ("parquet", [])])
def test_a_batch_that_is_not_finite_is_not_written(tmp_path, format, left):
    """Of a parquet file nothing is, and then not the settings either."""
    pipeline = pipeline_of()
    calls = []

    def spoil(module, args, output):
        calls.append(args)
        output.sample[0, 0, 0, 0] = torch.nan if len(calls) > 2 else 0.0

    hook = pipeline.unet.register_forward_hook(spoil)
    settings = {"num_images": 4, "batch_size": 2, "num_inference_steps": 2, "format": format}
    with pytest.raises(ValueError, match="the samples are not finite: 1 of 2 images hold NaN or infinities"):
        sample_to_folder(pipeline, tmp_path / "out", **settings)
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == left
    hook.remove()
    assert sample_to_folder(pipeline, tmp_path / "out", **settings) == (2 if left else 4)


def test_comparing_tells_of_a_solver_whose_samples_are_not_finite(monkeypatch, caplog):
    step, captions = diffusers.EulerDiscreteScheduler.step, []

    def diverging(*args, **kwargs):
        output = step(*args, **kwargs)
        output.prev_sample *= torch.inf
        return output

    def grid(*args, **settings):
        captions.extend(settings["captions"])
        return films.grid(*args, **settings)

    monkeypatch.setattr(diffusers.EulerDiscreteScheduler, "step", diverging)
    monkeypatch.setattr(sample_comparison, "grid", grid)
    picture = compare_solvers(pipeline_of(), ["euler", "ddim"], [2, 3])
    assert picture.size[0] > 100
    assert captions[:2] == ["not finite", "not finite"]
    assert all(re.fullmatch(r"\d+\.\d\d s", caption) for caption in captions[2:])
    assert len(captions) == 4
    assert "euler with 3 steps is left out: the samples are not finite: 4 of 4 images" in caplog.text
    with pytest.raises(ValueError, match="the samples are not finite"):
        compare_solvers(pipeline_of(), ["euler"], [2, 3])  # no cell has images


def test_images_of_many_channels_are_compared_too():
    assert compare_solvers(pipeline_of(in_channels=5), ["ddim"], [2], num_images=1).size[1] > 8
