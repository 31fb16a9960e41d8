import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import tiny_config
from PIL import Image

import ddpm_hf
from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.commands.main import COMMANDS, main
from ddpm_hf.evaluation.legibility import digits_legibility
from ddpm_hf.training import train
from ddpm_hf.training.config import recipe_names
from ddpm_hf.training.log import read_log

ROOT = Path(__file__).parent.parent
QUICK = ["--max_train_steps", "6", "--checkpointing_steps", "4", "--eval_batch_size", "9"]
QUICK += ["--ddpm_num_inference_steps", "5", "--train_batch_size", "16"]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ddpm-hf {ddpm_hf.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    assert "train" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readmes_first_line_in_few_steps(tmp_path):
    """`accelerate launch examples/train.py`: all that it leaves, on the embedded digits."""
    command = [sys.executable, "-m", "accelerate.commands.launch", ROOT / "examples/train.py", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    out = tmp_path / "runs/digits"
    assert "1617 images of 1x8x8, 6 updates to go -> runs/digits" in done.stdout
    assert "A support-vector classifier recognises" in done.stdout
    assert "loss=" in done.stderr
    assert "images/s" in done.stderr
    for name in ("samples.png", "forward.png", "loss.png", "denoising.gif"):
        Image.open(out / name).verify()
    assert Image.open(out / "denoising.gif").n_frames == 5
    with open(out / "log.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [4, 6]
    assert DDPMCustomPipeline.from_pretrained(out)(1, num_inference_steps=2).images[0].size == (8, 8)
    again = [*command[:4], "--config", "runs/digits/train_config.json", "--output_dir", "runs/again"]
    subprocess.run(again, cwd=tmp_path, capture_output=True, check=True)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "runs/again" / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: <command>"),
        (["trian"], "invalid choice: 'trian'"),
        (["trian"], "; did you mean 'train'?"),
        (
            ["train", "--unet", '{"block_out_chanels": [32]}'],
            "setting 'block_out_chanels'; did you mean 'block_out_channels'?",
        ),
        (["train", "--unet", '{"norm_eps": -1}'], "norm_eps=-1 must be a number in (0, 1]"),
        (["train", "--output_dir", ""], "output_dir='' must be a text that is not empty"),
        (["train", "--config", "nothing"], "config='nothing' is neither a file nor one of the recipes"),
        (["train", "--train_data_dir", "nowhere"], "train_data_dir='nowhere' is not a folder"),
        (["train", "--max_train_steps", "0"], "max_train_steps=0 must be an integer of at least 1"),
        (["train", "--train_batch_size", "-1"], "train_batch_size=-1 must be an integer of at least 1"),
        (["train", "--seed"], "expected one argument"),
        (
            ["train", "--pretrained_model_name_or_path", "./nowhere"],
            "='./nowhere' can't be loaded",
        ),
        (
            ["train", "--ddpm_num_inference_steps", "2000"],
            "num_inference_steps=2000: LinearNoiseScheduler takes 1 ... 1000 steps",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capfd, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_flags_of_diffusers_script_that_are_something_else_here(capfd):
    for flag, hint in {
        "--use_ema": "leave it out: EMA weights are always computed and saved",
        "--ddpm_num_steps=500": "use --scheduler '{\"num_train_timesteps\": 1000}'",
        "--save-images-epochs": "use --checkpointing_steps, in updates",
        "--learning_rat": "did you mean '--learning_rate'?",
    }.items():
        for command in ("train", "plan"):
            assert main([command, flag]) == 2
            assert f"unknown flag '{flag.partition('=')[0]}'; {hint}" in capfd.readouterr().err


def test_flags_spelt_as_before(capfd):
    """With dashes, or under another name: for a version, and not in the help."""
    assert main(["sample", "./nowhere", "--output", "out", "--num-images=3", "--seed", "1"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == [
        "ddpm-hf: --output is deprecated and will be removed; use --output_dir",
        "ddpm-hf: --num-images is deprecated and will be removed; use --num_images",
    ]
    assert "model='./nowhere' can't be loaded" in lines[2]
    assert main(["push", "./nowhere", "me/model", "--self-contained", "--create-pr"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("; ")[1] for line in lines[:2]] == ["use --self_contained", "use --create_pr"]
    assert "nowhere' does not exist; it must be a pipeline folder" in lines[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--\S+)", text, re.M)
    assert not [flag for flag in flags if "-" in flag[2:]]
    assert "None" not in text
    defaults = {"train": "learning_rate .*?0.0001", "sample": "batch_size .*?64", "evaluate": "num_samples .*?2000"}
    if command in defaults:
        flag, default = defaults[command].split(" .*?")
        assert re.search(rf"^  --{flag} [^(]*\(default:\s+{default}\)", text, re.M)
        assert len(re.findall(r"^[a-z ]+:$", text, re.M)) >= 4  # headings


def test_a_package_that_is_missing(monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "ddpm_hf.evaluation.evaluate", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["evaluate", "model"]) == 2
    error = capfd.readouterr().err
    assert "accelerate" in error
    assert error.endswith("`ddpm-hf evaluate` needs more packages, `pip install ddpm-hf[eval]`\n")
    assert error.count("\n") == 1


def test_a_mistake_has_no_traceback_in_a_real_process(tmp_path):
    for command in ([ROOT / "examples/train.py"], ["-m", "ddpm_hf", "train"]):
        command = [sys.executable, *command, "--train_data_dir", "nowhere"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "train_data_dir='nowhere' is not a folder; it must be a folder of" in done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_examples_run(tmp_path):
    printed = ""
    command = [sys.executable, ROOT / "examples/minimal_loop.py", "--steps", "3", "--output", "grid.png"]
    printed += subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Image.open(tmp_path / "grid.png").size > (32, 32)
    train(tiny_config(tmp_path / "model", class_conditional=True))
    command = [sys.executable, ROOT / "examples/guidance.py", "model", "--scales", "1", "4", "--steps", "2"]
    printed += subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Image.open(tmp_path / "guidance.png").height > 10 * 65
    command = [sys.executable, ROOT / "examples/sample.py", "model", "--class_label", "3", "--steps", "6"]
    printed += subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    for name in ("film.gif", "trajectory.png", "interpolation.png", "variations.png", "inpainting.png"):
        assert Image.open(tmp_path / name).width > 100
    names = {
        "grid.png",
        "guidance.png",
        "film.gif",
        "trajectory.png",
        "interpolation.png",
        "variations.png",
        "inpainting.png",
    }
    assert names <= set(printed.split())
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path


def test_the_recipe_of_classes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "digits-classes", *QUICK]) == 0
    assert "% of the samples to their class (guidance 2)" in capfd.readouterr().out
    pipeline = DDPMCustomPipeline.from_pretrained("runs/digits-classes")
    assert len(pipeline(class_labels=["3", 3], guidance_scale=2, num_inference_steps=2).images) == 2


@pytest.mark.slow
def test_the_digit_that_was_asked_for_is_drawn(tmp_path, monkeypatch):
    """The recipe as it is: at least 95 % of 200 samples, read by a classifier that has seen real digits only."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "digits-classes"]) == 0
    pipeline = DDPMCustomPipeline.from_pretrained("runs/digits-classes")
    told = digits_legibility(pipeline, 50, seed=1, num_samples=200, guidance_scale=2)
    assert told.accuracy >= 0.95
    assert told.samples >= 0.95


def test_an_output_folder_that_is_a_file(tmp_path, capfd):
    (tmp_path / "out").write_text("mine")
    assert main(["train", "--output_dir", str(tmp_path / "out")]) == 2
    assert "out' is a file; it must be a folder" in capfd.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_digits_of_another_size_are_not_read(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resolution", "12", *QUICK]) == 0
    assert "classifier" not in capfd.readouterr().out
    assert Image.open("runs/digits/samples.png")


IMAGES_OF_THEIR_KIND = {  # what stands in for what can't be downloaded
    "cifar10": "cifar10", "course-butterflies": "flowers17_64", "ddpm-cifar10": "cifar10",
    "explainingai-mnist": "mnist", "explainingai-textures": "dtd10_64", "images-128": "flowers17_64",
    "images-32": "cifar10", "images-64": "flowers17_64", "labml-celeba": "flowers17_64",
    "labml-mnist": "mnist", "learnopencv-cifar10": "cifar10", "learnopencv-flowers": "flowers17_64",
    "learnopencv-mnist": "mnist", "mnist": "mnist",
}  # fmt: skip


SMALL = ("cifar10", "images-32", "mnist")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SMALL else pytest.mark.slow)
        for name in recipe_names()
        if "digits" not in name
    ],
)
def test_the_recipes_train_on_real_images_of_their_kind(shared, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = Path(IMAGES_OF_THEIR_KIND[name])
    folder.mkdir()
    for file, rows in {"train.parquet": 64, "test.parquet": 8}.items():  # the rest takes minutes to decode
        pq.write_table(pq.read_table(shared / "data" / folder / file)[:rows], folder / file)
    argv = ["train", "--config", name, "--train_data_dir", str(folder)]
    argv += ["--train_batch_size", "2", "--max_train_steps", "2", "--eval_batch_size", "1"]
    assert main([*argv, "--ddpm_num_inference_steps", "2"]) == 0
    out = tmp_path / "runs" / IMAGES_OF_THEIR_KIND[name]
    assert Image.open(out / "samples.png").mode == ("L" if name.endswith("mnist") else "RGB")
    losses = [row["loss"] for row in read_log(out / "log.csv")]
    assert 0.3 < losses[0] < 5  # of an untrained network: about the noise's variance
    shutil.rmtree("runs")  # gigabytes


@pytest.mark.parametrize("name", ["explainingai-textures", "images-64", "labml-celeba", "learnopencv-flowers"])
def test_a_recipe_without_a_data_set_asks_for_one(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", name]) == 2
    assert "the recipe has no data set: give --train_data_dir" in capfd.readouterr().err
