import dataclasses
import json
import os
import subprocess
import sys

import pytest

from ddpm_hf.commands import train
from ddpm_hf.commands.parsing import Parser
from ddpm_hf.data.config import DataConfig
from ddpm_hf.training.config import TrainConfig, load_recipe, recipe_names, resolve
from ddpm_hf.training.recipes import LARGEST_SIDE, OF_GRAY


def parse_train_config(args) -> TrainConfig:
    """As `ddpm-hf train` reads its flags, without a look at the images."""
    parser = Parser()
    train.add_arguments(parser)
    return resolve(vars(parser.parse_args(args)))


def test_flags_over_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 1e-3\ntrain_batch_size: 8\nunet: {dropout: 0.1, stem_channels: 16}\n")
    config = parse_train_config(["--config", str(recipe), "--train_batch_size", "4", "--unet", '{"dropout": 0.2}'])
    assert (config.learning_rate, config.train_batch_size, config.seed) == (1e-3, 4, 0)
    assert config.unet == {"dropout": 0.2, "stem_channels": 16}
    assert config.output_dir == "runs/mine"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_configuration_that_saves_to_itself(tmp_path, name):
    config = parse_train_config(["--config", name])
    config.save(tmp_path / "train_config.json")
    again = parse_train_config(["--config", str(tmp_path / "train_config.json")])
    assert again == config
    assert config.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_say_only_what_differs_from_the_defaults(name):
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    recipe = load_recipe(name)
    recipe.pop("config")
    same = [key for key, value in recipe.items() if defaults[key] == value]
    assert not same


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ({"train_data_dir": "photos"}, "photos"),
        ({"train_data_dir": "some/photos/"}, "photos"),
        ({"train_data_dir": "."}, "here"),
        ({"train_data_dir": "photos/.."}, "here"),
        ({"train_data_dir": "/"}, "digits"),  # a folder without a name
        ({"dataset_name": "user/flowers"}, "flowers"),
        ({"config": "mnist", "dataset_name": "user/flowers"}, "flowers"),
        ({"config": "labml-celeba", "train_data_dir": "photos"}, "photos"),
        ({"config": "learnopencv-mnist", "dataset_name": "ylecun/mnist"}, "learnopencv-mnist"),  # its own
        ({"config": "digits-classes"}, "digits-classes"),
        ({"config": "mine.yaml"}, "mine"),  # which names the folder itself
        ({"config": "mine.yaml", "train_data_dir": "others"}, "others"),
        ({"config": "mine.yaml", "train_data_dir": "others", "output_dir": "models/a"}, None),
    ],
)
def test_the_output_is_named_after_the_data_that_is_not_the_recipes_own(tmp_path, monkeypatch, flags, folder):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "mine.yaml").write_text("train_data_dir: photos\n", encoding="utf-8")
    assert resolve(flags).output_dir == (f"runs/{folder}" if folder else "models/a")


def test_a_configuration_without_a_recipe_is_named_after_its_data_too():
    assert TrainConfig(train_data_dir="some/photos").output_dir == "runs/photos"
    assert TrainConfig(dataset_name="user/flowers").output_dir == "runs/flowers"
    with pytest.raises(ValueError, match="train_data_dir=5 must be a text that is not empty, or null"):
        TrainConfig(train_data_dir=5)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_images_choose_count_updates_and_mirror_nothing(name):
    config = resolve({"config": name})
    if name in {*LARGEST_SIDE, *OF_GRAY.values()}:
        assert config.max_train_steps
        assert not config.random_flip
    if name.startswith("images-"):
        assert config.dataset_name is None


def test_settings_are_utf_8_whatever_the_machines_encoding(tmp_path):
    """As of a machine whose locale is C, which reads and writes ASCII."""
    (tmp_path / "mine.yaml").write_text("train_data_dir: Blüten\n", encoding="utf-8")
    code = "from ddpm_hf.training.config import resolve; resolve({'config': 'mine.yaml'}).save('again.json')\n"
    code += "assert resolve({'config': 'again.json'}).train_data_dir == 'Bl\\xfcten'"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "photo.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="config='.*photo.yaml' can't be read as YAML or JSON in UTF-8"):
        load_recipe(str(tmp_path / "photo.yaml"))


def test_the_flags_are_frozen():
    """What people have in their scripts. Add here; take away or rename only with a major version."""
    assert {f.name for f in dataclasses.fields(TrainConfig)} == {
        "config", "output_dir", "overwrite_output_dir", "dataset_name", "dataset_config_name", "train_data_dir",
        "image_column", "label_column",
        "resolution", "resize", "channels", "frames", "slices", "value_range", "clip_values", "nodata", "nodata_fill",
        "background", "alpha_channel", "max_bad_fraction", "group_by", "held_out_split", "streaming", "cache_dir",
        "dataloader_num_workers", "random_crop", "random_vertical_flip", "random_rotate90", "class_balance",
        "random_flip", "class_conditional", "label_dropout", "data_license",
        "pretrained_model_name_or_path", "unet", "objective", "scheduler", "prediction_type",
        "learned_variance", "sampling_scheduler", "sampling_steps", "flow_times", "noise_level_mean", "noise_level_std",
        "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_epochs", "learning_rate",
        "optimizer", "muon_learning_rate", "lr_decay_share", "noise_assignment",
        "ema_sigma_rel", "post_hoc_ema", "post_hoc_ema_limit",
        "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
        "max_grad_norm", "ema_max_decay", "snr_gamma", "antithetic_timesteps", "gradient_checkpointing",
        "compile", "mixed_precision", "seed",
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "eval_batch_size",
        "ddpm_num_inference_steps", "guidance_scale", "preview_time_share", "logger",
        "push_to_hub", "hub_model_id", "hub_private_repo",
    }  # fmt: skip


def test_another_schedule_has_its_own_betas():
    cosine = '{"beta_schedule": "squaredcos_cap_v2"}'
    assert parse_train_config(["--scheduler", cosine]).scheduler == {"beta_schedule": "squaredcos_cap_v2"}
    kept = parse_train_config(["--scheduler", '{"clip_sample": false}']).scheduler
    assert kept == {"beta_schedule": "scaled_linear", "beta_start": 1e-6, "clip_sample": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_conditional=True"),
        (
            {"guidance_scale": -1.0, "class_conditional": True},
            "guidance_scale=-1.0 must be a finite number of at least 0",
        ),
        ({"guidance_scale": 2.0, "class_conditional": True, "label_dropout": 0.0}, "label_dropout=0.0 must be greater"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0 must be a number in \[0, 1\)"),
        ({"snr_gamma": 0.0}, "snr_gamma=0.0 must be a finite number greater than 0"),
        ({"prediction_type": "x0"}, "prediction_type='x0' must be one of epsilon, sample, v_prediction"),
        (
            {"prediction_type": "epsilon", "scheduler": {"prediction_type": "sample"}},
            "prediction_type='epsilon' contradicts prediction_type='sample' in scheduler: give one of them",
        ),
    ],
)
def test_classes_and_objectives_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_flags_of_every_type():
    config = parse_train_config(["--value_range", "0", "65535", "--random_flip", "--resolution", "32", "--seed", "7"])
    assert config.value_range == [0.0, 65535.0]
    assert config.random_flip is True
    assert (config.resolution, config.seed) == (32, 7)


def test_pretrained_weights_bring_their_network_and_scheduler():
    config = resolve({"pretrained_model_name_or_path": "somewhere"})
    assert (config.unet, config.scheduler) == ({}, {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "nothing"], "config='nothing' is neither a file nor one of the recipes .*digits"),
        (["--learning_rat", "1"], "unknown flag '--learning_rat'"),
        (["--learning_rate", "fast"], "learning_rate.*: invalid float value: 'fast'"),
        (["--learning_rate", "0"], "learning_rate=0.0 must be a finite number greater than 0"),
        (["--max_train_steps", "0"], "max_train_steps=0 must be an integer of at least 1"),
        (["--train_batch_size", "-4"], "train_batch_size=-4 must be an integer of at least 1"),
        (["--lr_scheduler", "step"], "lr_scheduler='step' must be one of constant, cosine, linear"),
        (["--mixed_precision", "fp8"], "mixed_precision='fp8' must be one of no, bf16, fp16"),
        (["--value_range", "5"], r"value_range=\[5.0\] must be a list of 2 numbers"),
        (["--value_range", "5", "1"], r"value_range=\[5.0, 1.0\] must be two numbers"),
        (["--adam_beta1", "1"], r"adam_beta1=1.0 must be a number in \[0, 1\)"),
        (["--unet", "{dropout"], "unet='{dropout' is not a JSON object: it is not valid JSON: Expecting property name"),
        (["--unet", "3"], "unet='3' is not a JSON object: it must hold an object, not int"),
        (["--seed", str(2**63)], "seed=9223372036854775808 must be an integer in 0 ... 9,223,372,036,854,775,807"),
        (["--learning_rate", "inf"], "learning_rate=inf must be a finite number greater than 0"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train_config(flags)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rte: 1e-3", "there is no setting 'learning_rte'; did you mean 'learning_rate'?"),
        ("seed: many", "seed='many' must be an integer in 0"),
        ("seed: 1.5", "seed=1.5 must be an integer in 0"),
        ("random_flip: 1", "random_flip=1 must be true or false"),
        ("resolution: [1, 2, 3]", r"resolution=\[1, 2, 3\] must be a list of one or two integers, or null"),
        (
            "resolution: [1, 0]",
            r"resolution=\[1, 0\] must be a list of one or two integers; each must be an",
        ),
        ("resolution: wide", "resolution='wide' must be an integer of at least 1, or null"),
        ("resize: stretch", "resize='stretch' must be one of crop, pad, squeeze"),
        ("unet: [1]", r"unet=\[1\] must be a mapping"),
        ("value_range: [0, white]", r"value_range=\[0, 'white'\] must be a list of 2 numbers"),
        ("- a list", "must contain settings"),
        ("a: [", "can't be read as YAML or JSON"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_train_config(["--config", str(path)])


def test_epochs_that_are_asked_for_take_the_place_of_the_recipes_steps():
    assert parse_train_config(["--config", "digits"]).max_train_steps
    config = parse_train_config(["--config", "digits", "--num_epochs", "3"])
    assert (config.num_epochs, config.max_train_steps) == (3, None)


def test_what_is_saved_begins_from_the_beginning(tmp_path):
    config = TrainConfig(resume_from_checkpoint="latest", overwrite_output_dir=True, seed=5)
    config.save(tmp_path / "train_config.json")
    assert parse_train_config(["--config", str(tmp_path / "train_config.json")]) == TrainConfig(
        config="digits", seed=5, unet=config.unet
    )


def test_yaml_as_people_write_it(tmp_path):
    text = "mixed_precision: no\nrandom_flip: yes\nclass_conditional: True\nlearning_rate: 1e-4\nseed: 12\n"
    (tmp_path / "a.yaml").write_text(text + "scheduler: {beta_start: 1e-6, clip_sample: False}\n")
    config = parse_train_config(["--config", str(tmp_path / "a.yaml")])
    assert (config.mixed_precision, config.random_flip, config.class_conditional) == ("no", True, True)
    assert (config.learning_rate, config.seed) == (1e-4, 12)
    assert config.scheduler == {"beta_start": 1e-6, "clip_sample": False}


def test_the_data_settings_of_a_run_are_a_configuration_of_their_own(tmp_path):
    config = TrainConfig(train_data_dir="photos", resolution=32, learning_rate=1e-3, seed=5)
    config.save(tmp_path / "train_config.json")
    again = DataConfig.from_json(tmp_path / "train_config.json", seed=6)
    assert dataclasses.asdict(again).items() <= {**dataclasses.asdict(config), "seed": 6}.items()
    with pytest.raises(ValueError, match="resolution=0 must be an integer of at least 1, or null"):
        DataConfig(resolution=0)


def test_a_json_file_is_a_recipe_too(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"learning_rate": 1e-05, "num_epochs": 3}))
    config = parse_train_config(["--config", str(path)])
    assert (config.learning_rate, config.num_epochs) == (1e-05, 3)
