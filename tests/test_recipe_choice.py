"""The recipe for images of one's own, where none is named, and the list of recipes."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY_UNET
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ddpm_hf import DDPMUNet
from ddpm_hf.commands.main import main
from ddpm_hf.training.config import TrainConfig, load_recipe, recipe_names, recipe_text, resolve
from ddpm_hf.training.plan import count_flops, count_memory, network
from ddpm_hf.training.recipes import _description, for_planning, for_training, listing, recipe_for

QUICK = ["--eval_batch_size", "2", "--ddpm_num_inference_steps", "2", "--train_batch_size", "2", "--unet"]
QUICK += [json.dumps(TINY_UNET)]


def folder_of(path, size, mode="RGB", n=4):
    path.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new(mode, size, color=50 * k if mode == "L" else (50 * k, 0, 0)).save(path / f"{k}.png")
    return path


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((1, 8, 8), "digits"),
        ((3, 12, 12), "digits"),
        ((3, 8, 13), "images-32"),  # the larger side counts
        ((3, 13, 8), "images-32"),
        ((1, 13, 13), "mnist"),
        ((1, 48, 48), "mnist"),
        ((3, 48, 48), "images-32"),
        ((5, 48, 48), "images-32"),
        ((1, 49, 49), "images-64"),
        ((3, 96, 96), "images-64"),
        ((3, 97, 20), "images-128"),
        ((1, 512, 512), "images-128"),
    ],
)
def test_the_size_chooses(shape, name):
    assert recipe_for(shape) == name
    assert name in recipe_names()


@pytest.mark.parametrize(
    ("size", "mode", "settings", "recipe", "shape"),
    [
        ((9, 9), "RGB", {}, "digits", "3x9x9"),
        ((28, 20), "L", {}, "mnist", "1x20x28"),
        ((28, 28), "L", {"channels": 3}, "images-32", "3x28x28"),
        ((28, 28), "RGB", {"channels": 1}, "mnist", "1x28x28"),
        ((64, 60), "RGB", {}, "images-64", "3x60x64"),
        ((200, 100), "RGB", {"resolution": 32}, "images-32", "3x32x32"),
        ((8, 8), "RGB", {"resolution": 100, "channels": 3}, "images-128", "3x100x100"),
    ],
)
def test_the_first_image_chooses_as_the_settings_decode_it(tmp_path, capsys, size, mode, settings, recipe, shape):
    folder = folder_of(tmp_path / "photos", size, mode)
    flags = {"train_data_dir": str(folder), **settings}
    config = for_training(flags)
    told = capsys.readouterr().out
    assert told.startswith(f"recipe {recipe}, chosen for images of {shape} (")
    assert told.count("\n") == 1
    expected = resolve({**flags, "config": recipe})
    assert config == expected
    assert (config.config, config.output_dir) == (recipe, "runs/photos")
    assert (config.unet, config.max_train_steps) == (
        load_recipe(recipe)["unet"],
        load_recipe(recipe)["max_train_steps"],
    )


def test_what_it_costs_is_what_plan_counts(tmp_path, capsys):
    folder = folder_of(tmp_path / "a", (20, 20))
    config = for_training({"train_data_dir": str(folder), "train_batch_size": 6})
    unet = network(config, (3, 20, 20))
    flops = sum(map(sum, count_flops(unet, (3, 20, 20)))) / 1e9
    memory = count_memory(unet, (3, 20, 20), 6).peak / 2**20
    parameters = sum(p.numel() for p in unet.parameters()) / 1e6
    assert (
        f": {parameters:.2f} M parameters, {flops:.3g} GFLOPs per image with backward, {memory:.1f} MiB of tensors "
        "at batch 6\n" in capsys.readouterr().out
    )


def test_images_that_cannot_be_read_do_not_choose(tmp_path, capsys):
    folder = folder_of(tmp_path, (20, 20), "L")
    (folder / "0.png").write_bytes(b"broken")
    assert for_training({"train_data_dir": str(folder)}).config == "mnist"
    for path in folder.glob("*.png"):
        path.write_bytes(b"broken")
    assert main(["train", "--train_data_dir", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "4 of 4 images can't be used" in printed.err


def test_a_stream_chooses_by_its_first_image(tmp_path, monkeypatch, capsys):
    pixels = [np.full((20, 20), 40 * k, np.uint8) for k in range(3)]
    features = Features({"image": ImageFeature(), "k": Value("int64")})
    rows = {"image": [Image.fromarray(p) for p in pixels], "k": [0, 1, 2]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-0.parquet")
    read = Dataset.from_parquet

    def streamed(files, streaming=False):
        assert streaming, "otherwise all of it is kept on the disk"
        return read(files, streaming=streaming)

    monkeypatch.setattr(Dataset, "from_parquet", streamed)
    config = for_training({"train_data_dir": str(tmp_path), "streaming": True})
    assert (config.config, config.max_train_steps) == ("mnist", 9375)
    assert "images of 1x20x20" in capsys.readouterr().out


def test_classes_are_counted_in(tmp_path, capsys):
    for name in "abc":
        folder_of(tmp_path / "photos" / name, (20, 20))
    flags = {
        "train_data_dir": str(tmp_path / "photos"),
        "class_conditional": True,
        "unet": {"time_embedding_dim": 1000},
    }
    config = for_training({**flags, "resolution": 20, "channels": 3})
    with torch.device("meta"):
        unet = DDPMUNet(in_channels=3, num_classes=3, **config.unet)
    assert f": {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters" in capsys.readouterr().out


def test_images_without_classes_are_refused_by_training(tmp_path, capsys):
    folder = folder_of(tmp_path / "photos", (20, 20))
    argv = ["train", "--train_data_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--class_conditional", "true", "--resolution", "20", "--channels", "3"]) == 2
    assert "photos' have no classes; they need" in capsys.readouterr().err


def test_a_pretrained_network_stays_as_it_is(tmp_path, trained, capsys):
    folder = folder_of(tmp_path, (20, 20), "L")
    config = for_training({"train_data_dir": str(folder), "pretrained_model_name_or_path": str(trained)})
    assert (config.config, config.unet, config.scheduler) == ("mnist", {}, {})
    assert config.learning_rate == load_recipe("mnist")["learning_rate"]
    assert capsys.readouterr().out.endswith(f"; the network is that of {trained}\n")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"dataset_name": "digits"},
        {"config": "cifar10", "train_data_dir": "nowhere"},
        {"config": "labml-celeba", "dataset_name": "nobody/nothing"},
    ],
)
@pytest.mark.parametrize("choose", [for_training, for_planning])
def test_nothing_is_chosen_where_the_user_has_chosen(capsys, choose, flags):
    assert choose(flags) == resolve(flags)
    assert capsys.readouterr().out == ""


def test_of_several_processes_one_tells(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path, (20, 20), "L")
    monkeypatch.setenv("RANK", "1")
    assert for_training({"train_data_dir": str(folder)}).config == "mnist"
    assert capsys.readouterr().out == ""


def test_flags_go_over_what_is_chosen(tmp_path):
    flags = {"train_data_dir": str(folder_of(tmp_path, (20, 20), "L")), "unet": {"dropout": 0.3}, "num_epochs": 2}
    config = for_training({**flags, "learning_rate": 5e-5})
    assert (config.config, config.learning_rate) == ("mnist", 5e-5)
    assert (config.num_epochs, config.max_train_steps) == (2, None)
    assert config.unet == {**load_recipe("mnist")["unet"], "dropout": 0.3}


def test_the_choice_is_recorded_and_made_again_by_a_run_that_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "my_photos", (14, 14), "L")
    argv = ["train", "--train_data_dir", "my_photos/", *QUICK]
    assert main([*argv, "--max_train_steps", "1"]) == 0
    assert main([*argv, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]) == 0
    told = re.findall(r"^recipe (\S+), chosen|(\d) updates to go -> (\S+)$", capfd.readouterr().out, re.M)
    once = [("mnist", "", ""), ("", "1", "runs/my_photos")]
    assert told == once * 2
    assert json.loads((tmp_path / "runs/my_photos/train_config.json").read_text(encoding="utf-8"))["config"] == "mnist"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["my_photos"]


def test_the_list_of_recipes(capsys):
    assert main(["recipes"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert [line.rsplit("  ", 1)[1] for line in lines] == [
        recipe_text(name).splitlines()[0].removeprefix("# ") for name in recipe_names()
    ]
    cells = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert cells["mnist"][1:4] == ["ylecun/mnist", "1x28x28", "1.59 M"]
    assert cells["learnopencv-mnist"][1:3] == ["ylecun/mnist", "1x32x32"]
    assert cells["explainingai-textures"][1:3] == ["your own", "3x28x28"]
    assert cells["labml-celeba"][1:3] == ["your own", "32x32"]
    assert [cells[f"images-{side}"][2] for side in (32, 64, 128)] == ["13 to 48", "49 to 96", "97 and more"]
    assert [head.index(word) for word in ("data", "images")] == [lines[0].index(cell) for cell in cells["cifar10"][1:3]]


def test_recipes_say_in_a_line_what_they_are_for():
    for line in (recipe_text(name).splitlines()[0] for name in recipe_names()):
        assert re.fullmatch(r"# \S.{10,75}\.", line), line


@pytest.mark.parametrize("side", [64, 128])
def test_the_recipes_for_one_gpu_say_what_is_counted(side):
    """In their comments, and at the sizes that they are made for it leaves room on 24 GB."""
    config = resolve({"config": f"images-{side}", "channels": 3})
    text = " ".join(recipe_text(config.config).replace("\n#", "").split())
    pairs = re.findall(r"([\d.]+) GiB of tensors at (\d+)x|and ([\d.]+) GiB at (\d+)x", text)
    assert len(pairs) == 2
    for told, size in ((a or c, int(b or d)) for a, b, c, d in pairs):
        shape = (3, size, size)
        peak = count_memory(network(config, shape), shape, config.train_batch_size).peak
        assert f"{peak / 2**30:.1f}" == told
        assert size > 128 or 1.4 * peak < 24e9  # 5 to 39 % more was measured on the CPU (benchmarks/memory.csv)


def test_help_shows_the_list(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"^ +recipes +\S", capsys.readouterr().out, re.M)
    assert len(listing()) == len(recipe_names()) + 1


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((1, 80, 860), "--resolution 40 430 halves the sides and costs less"),
        ((3, 144, 256), "--resolution 128 scales the images down and costs less"),
        ((1, 64, 64), ""),
    ],
)
def test_the_advice_for_large_images_makes_them_smaller(shape, advice):
    """A resolution of 128 would enlarge a spectrogram of 80 rows."""
    words = _description(TrainConfig(dataset_name="digits", unet=TINY_UNET), shape, None)
    assert words.rpartition("; ")[2] == advice if advice else "costs less" not in words
