"""Hostile arguments: values of wrong types, sizes and ranges for calls that are otherwise valid."""

import inspect
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from conftest import TINY_UNET, tiny_unet
from PIL import Image

from ddpm_hf import (
    CosineNoiseScheduler,
    DDPMCustomPipeline,
    DDPMUNet,
    EDMScheduler,
    FlowMatchScheduler,
    LinearNoiseScheduler,
)
from ddpm_hf.commands import train
from ddpm_hf.commands.parsing import Parser
from ddpm_hf.convert.convert import convert, convert_back
from ddpm_hf.data.config import DataConfig
from ddpm_hf.schedulers.solvers import make_solver
from ddpm_hf.training.config import TrainConfig


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no words")


VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**12, -(10**12), 2**31, 2**63, 2**64, 10**400, 10**5000,
    0.0, -0.0, 0.5, 1.5, -1.0, 1e-17, 1e-320, 1e308, math.nan, math.inf, -math.inf, 1 + 2j,
    "", "0", "1", "false", "nan", "epsilon", "ddim", "a" * 10**6, "\0", "\x1b[31m", "../..", "/no/such/folder",
    "no/such/folder", "\ud800", "{}", "[1]", b"", b"1", [], (), {}, set(), [None], [0], [1], [1, 2], [-1], [[1],
    [2, 3]],
    [10**9], [10**9] * 3, [16, 16], (16, 8), [True, False], ["a", "a"], [math.nan], [0.1] * 1000, [1] * 10**5,
    ["b" * 10**5],
    {"a": 1}, {1: 2}, {"b" * 10**5: 1}, object(), Unprintable(), int, len, range(3), iter([1, 2]), Path("nowhere"),
    np.int64(3), np.float32(0.5), np.float64(math.nan), np.bool_(True), np.str_("x"), np.array([]), np.array(3),
    np.array([1, 2]), np.array(["a"]), np.array([None]), np.zeros((8, 8)), np.zeros((2, 8, 8, 1), np.longdouble),
    np.ones((1, 8, 8, 1), np.float32), np.full((8, 8, 1), math.nan), torch.tensor(3), torch.tensor(0.5),
    torch.tensor([]),
    torch.tensor([1, 2]), torch.tensor([0.1, 0.2]), torch.tensor(True), torch.tensor(1 + 2j), torch.zeros(1, 1, 8, 8),
    torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(1, 1, 8, 8).double(),
    torch.zeros(1, 1, 8, 8, dtype=torch.int64), torch.full((1, 1, 8, 8), math.inf), torch.zeros(1, 1, 8, 8,
    device="meta"),
    torch.zeros(1, 1, 3, 300), torch.float32, torch.device("cpu"), torch.Generator(), [torch.Generator()] * 2,
    Image.new("L", (8, 8)), Image.new("RGB", (8, 8)), Image.new("1", (1, 1)), [Image.new("L", (8, 8))] * 2,
]  # fmt: skip
FLAGS = [
    "", "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e-17", "1e400", "true", "None", "null", "{", "{}", "[",
    "[1]", "[[[",
    '{"a": 1}', '{"block_out_chanels": [32]}', '{"norm_eps": -1}', '{"dropout": NaN}', '{"clip_sample": "false"}',
    '{"block_out_channels": [1000000000]}', '{"num_train_timesteps": 1000000000000}', '{"beta_start": 1e-17}',
    "[" * 10**5, "9" * 5000, "10000000000000", "a" * 10**5, "../..", "/no/such/folder", "\ud800", "--", "--seed",
    "-x", "ddim",
]  # fmt: skip
JSON = [value for value in VALUES if isinstance(value, int | float | str | list | dict | None)]
X = torch.zeros(2, 1, 8, 8)
ONE = torch.zeros(1, 1, 8, 8) + 0.5


class Cases:
    """`next(cases)` is (a description, a call that must succeed or raise ValueError)."""

    def __init__(self, folder: Path, saved: Path, seed: int = 0):
        self.random, self.folder = random.Random(seed), folder
        self.pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(num_train_timesteps=20))
        self.classes = DDPMCustomPipeline(tiny_unet(num_classes=3), LinearNoiseScheduler(num_train_timesteps=20))
        for pipeline in (self.pipeline, self.classes):
            pipeline.set_progress_bar_config(disable=True)
        self.saved = saved
        self.kinds = [self.config, self.network, self.scheduler, self.scheduler_call, self.continuous_call,
                      self.network_call, self.call,
                      self.editing, self.loading, self.conversion, self.command]  # fmt: skip

    def __iter__(self):
        return self

    def __next__(self):
        return self.random.choice(self.kinds)()

    def some(self, function, base: dict, names=None, values=VALUES):
        """`function` with some of its arguments replaced by hostile ones."""
        names = names or [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
        changed = {name: self.random.choice(values) for name in self.random.sample(names, self.random.randint(1, 2))}
        if callable(changed.get("callback_on_step_end")):
            changed["callback_on_step_end"] = 3  # of a function, the caller is to blame for what it raises
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"{name}({', '.join(changed)})", lambda: function(**base | changed), changed

    def config(self):
        kind = self.random.choice([DataConfig, TrainConfig])
        return self.some(kind, {})

    def network(self):
        return self.some(
            DDPMUNet, TINY_UNET | {"sample_size": 8}, list(inspect.signature(DDPMUNet.__init__).parameters)[1:]
        )

    def scheduler(self):
        kind = self.random.choice([LinearNoiseScheduler, CosineNoiseScheduler, FlowMatchScheduler, EDMScheduler])
        return self.some(kind, {}, list(inspect.signature(kind.__init__).parameters)[1:])

    def scheduler_call(self):
        s, t = LinearNoiseScheduler(num_train_timesteps=20), torch.tensor([3, 4])
        name, base = self.random.choice([
            ("add_noise", {"original_samples": X, "noise": X, "timesteps": t}),
            ("get_velocity", {"sample": X, "noise": X, "timesteps": t}),
            ("target", {"original_samples": X, "noise": X, "timesteps": t}),
            ("posterior", {"original_samples": X, "sample": X, "timesteps": t}),
            ("reverse", {"model_output": X, "sample": X, "timesteps": t}),
            ("step", {"model_output": X, "timestep": 3, "sample": X}),
            ("renoise", {"sample": X, "timestep": 3, "to_timestep": 4, "noise": X}),
            ("predicted_original", {"model_output": X, "timestep": 3, "sample": X}),
            ("min_snr_weight", {"timesteps": t, "gamma": 5.0}),
            ("set_timesteps", {"num_inference_steps": 5}),
        ])  # fmt: skip
        if self.random.random() < 0.2:
            return self.some(make_solver, {"solver": "ddim", "scheduler": s}, ["solver", "clip_sample"])
        return self.some(getattr(s, name), base)

    def continuous_call(self):
        kind, timestep = self.random.choice([FlowMatchScheduler, EDMScheduler]), torch.tensor([0.25, 0.5])
        s = kind()
        s.set_timesteps(5)
        to = s.timesteps[3].item()
        name, base = self.random.choice([
            ("add_noise", {"original_samples": X, "noise": X, "timesteps": timestep}),
            ("target", {"original_samples": X, "noise": X, "timesteps": timestep}),
            ("scale_model_input", {"sample": X, "timestep": timestep}),
            ("predicted_original", {"model_output": X, "timestep": timestep, "sample": X}),
            ("step", {"model_output": X, "timestep": to, "sample": X}),
            ("renoise", {"sample": X, "timestep": to, "to_timestep": s.timesteps[1].item(), "noise": X}),
            ("inverse_step", {"model_output": X, "timestep": to, "to_timestep": None, "sample": X, "prev_sample": X}),
            ("set_timesteps", {"num_inference_steps": 5}),
        ])  # fmt: skip
        if self.random.random() < 0.2:
            return self.some(make_solver, {"solver": "dpm++", "scheduler": s}, ["solver", "clip_sample"])
        return self.some(getattr(s, name), base)

    def network_call(self):
        unet = self.random.choice([self.pipeline.unet, self.classes.unet])
        labels = {"class_labels": torch.tensor([0, 1])} if unet is self.classes.unet else {}
        return self.some(unet, {"sample": X, "timestep": 3} | labels, ["sample", "timestep", "class_labels"])

    def call(self):
        pipeline = self.random.choice([self.pipeline, self.classes])
        base = {"num_inference_steps": 2, "output_type": "np", "batch_size": 2}
        base |= {"class_labels": 1} if pipeline is self.classes else {}
        names = list(inspect.signature(DDPMCustomPipeline.__call__).parameters)[1:]
        return self.some(pipeline, base, names)

    def editing(self):
        pipeline = self.random.choice([self.pipeline, self.classes])
        base = {"num_inference_steps": 2} | ({"class_labels": 1} if pipeline is self.classes else {})
        name, more = self.random.choice([
            ("inpaint", {"image": ONE, "mask": torch.ones(8, 8), "num_resamples": 1}),
            ("interpolate", {"image_a": ONE, "image_b": ONE, "t": 10, "steps": 2}),
            ("interpolate", {"method": "slerp", "steps": 2}),
            ("invert", {"image": ONE, "iterations": 1}),
        ])  # fmt: skip
        return self.some(getattr(pipeline, name), base | more)

    def loading(self):
        function, base = DDPMCustomPipeline.from_pretrained, {"pretrained_model_name_or_path": self.saved}
        names = ["pretrained_model_name_or_path", "subfolder", "variant", "torch_dtype", "use_safetensors", "token",
                 "cache_dir", "local_files_only", "force_download", "unet", "scheduler",
                 "no_such_argument"]  # fmt: skip
        if self.random.random() < 0.5:
            return self.some(function, base, names)
        component = self.random.choice(["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
        settings = json.loads((self.saved / component).read_text())
        name = self.random.choice(list(settings))
        settings[name] = self.random.choice(JSON)

        def load():
            path = self.folder / component
            original = path.read_text()
            try:
                path.write_text(json.dumps(settings, default=str, skipkeys=True))
                return function(self.folder)
            finally:
                path.write_text(original)

        return f"from_pretrained with {component}: {name}", load, {name: settings[name]}

    def conversion(self):
        function = self.random.choice([convert, convert_back])
        base = {"source": self.saved / "unet" / "config.json", "output": self.folder}
        return self.some(function, base)

    def command(self):
        """The parser with the settings of training, or `main` with arguments that end before any work."""
        from ddpm_hf.commands.main import COMMANDS, main

        if self.random.random() < 0.5:
            flags = [name for name in TrainConfig.__dataclass_fields__ if name not in ("config",)]
            argv = [f"--{self.random.choice(flags)}" + "=" + self.random.choice(FLAGS) for _ in range(2)]

            def parse():
                from ddpm_hf.training.config import resolve

                parser = Parser()
                train.add_arguments(parser)
                return resolve(vars(parser.parse_args(argv)))

            return f"train {[a[:60] for a in argv]}", parse, {}
        command = self.random.choice([*COMMANDS, "trian", "", "\ud800", "a" * 10**5])
        argv = [command, *(self.random.choice(FLAGS) for _ in range(self.random.randint(0, 3)))]
        argv += [f"--no_such_flag{self.random.choice(['', '=1'])}"]  # so that no command runs
        return f"main {[a[:60] for a in argv]}", lambda: main(argv), {}
