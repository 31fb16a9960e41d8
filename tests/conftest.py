"""Fixtures: where real data is, and two small models that are trained once per test run."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before torch is imported: the tests run side by side, and networks as small as these gain nothing from more threads.
os.environ["OMP_NUM_THREADS"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # the tests leave no decoded images in the cache of the user
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="ddpm_hf-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import config as datasets_config
from filelock import FileLock
from hub_server import HubServer
from huggingface_hub import constants, hf_api

from ddpm_hf import DDPMUNet
from ddpm_hf.training import TrainCallback, train
from ddpm_hf.training.config import TrainConfig

torch.set_num_threads(1)
datasets_config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05  # of 5 s, at the start of each epoch of a shuffled stream

TINY_UNET = {
    "stem_channels": 8,
    "block_out_channels": [16, 16],
    "attention": [False, True],
    "layers_per_block": 1,
    "mid_block_out_channels": [16],
    "mid_layers_per_block": 1,
    "up_block_out_channels": [16, 8],
    "num_attention_heads": 2,
    "time_embedding_dim": 16,
}


def tiny_unet(**settings) -> DDPMUNet:
    torch.manual_seed(0)
    return DDPMUNet(**{**TINY_UNET, "sample_size": 8, **settings}).eval()


def tiny_config(output_dir, **settings) -> TrainConfig:
    """A run of a few seconds on the real digits."""
    defaults = {
        "unet": TINY_UNET,
        "train_batch_size": 16,
        "max_train_steps": 4,
        "lr_warmup_steps": 2,
        "learning_rate": 1e-3,
        "checkpointing_steps": 100,
        "eval_batch_size": 4,
        "ddpm_num_inference_steps": 3,
    }
    return TrainConfig(output_dir=str(output_dir), **{**defaults, **settings})


def calls(**events) -> TrainCallback:
    """A callback that calls a function at an event: `calls(on_save=print)`."""
    callback = TrainCallback()
    for name, function in events.items():
        assert hasattr(callback, name)
        setattr(callback, name, function)
    return callback


def pytest_xdist_auto_num_workers(config) -> int:
    """`-n auto`: one worker per core. Test files and names that are given run here: they end before workers start."""
    selected = config.option.keyword or any(".py" in each for each in config.option.file_or_dir)
    return 0 if selected else min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items) -> None:
    """The slow tests first, so that the workers of pytest-xdist end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _new_accelerator_state():
    """Accelerate allows one precision a process; the tests try several."""
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of vectors and real images beside the checkout."""
    path = os.environ.get("DDPM_HF_SHARED")
    if not path:
        pytest.skip("DDPM_HF_SHARED is unset: no conformance vectors and no real images beside the digits")
    return Path(path)


def trained_once(tmp_path_factory, name, **settings) -> Path:
    """The output folder of a run that the first process to need it trains, for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path, finished = base / name / "run", base / f"{name}.finished"
    with FileLock(base / f"{name}.lock"):
        if not finished.exists():
            shutil.rmtree(path, ignore_errors=True)  # of a worker that failed
            train(tiny_config(path, **settings))
            finished.touch()
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The output folder of a finished tiny run on the digits. Not to be written to."""
    return trained_once(tmp_path_factory, "trained", max_train_steps=25, checkpointing_steps=10)


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory) -> Path:
    """The pipeline folder of a small class-conditional model that has learnt something. Not to be written to."""
    settings = {"max_train_steps": 600, "train_batch_size": 64, "learning_rate": 4e-3, "lr_scheduler": "cosine"}
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 1e-6}
    settings |= {"class_conditional": True, "scheduler": scheduler, "ema_max_decay": 0.99}
    return trained_once(tmp_path_factory, "digits_model", **settings)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback, to which this process is logged in as `me`, with a cache of its own."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # older clients read ENDPOINT when they are imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        assert server.unknown == []
