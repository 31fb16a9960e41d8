"""What decodes a folder of images fastest, and what reading them costs, in seconds and microseconds an image.

    python benchmarks/decoding.py [results.json]

10,000 PNG files of 32x32 pixels, made here. Contestants take turns in one run: `datasets`' `map` with processes of its
own, our worker processes alone, and the store (data/store.py), which writes what they decode into the cache of
`datasets`. Reading is random batches of 128.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import decoder_of, load_images
from ddpm_hf.data.sources import source_of
from ddpm_hf.data.workers import decode_each

NUMBER, ROUNDS, BATCH = 10_000, 3, 128


def make_files(folder: Path) -> None:
    random = np.random.default_rng(0)
    for k in range(NUMBER):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{k:05d}.png")


def by_map(config: DataConfig) -> datasets.Dataset:
    """`datasets`' own processes, which are forked, and a column of lists of integers."""
    decoder, items = decoder_of(config), source_of(config)[0]
    size = decoder(items[0].source).pixels.size
    features = datasets.Features({"pixels": datasets.List(datasets.Value("uint8"), length=size)})
    paths = datasets.Dataset.from_dict({"path": [str(item.source) for item in items]})
    return paths.map(
        lambda row: {"pixels": decoder(row["path"]).pixels.reshape(-1)},
        num_proc=config.dataloader_num_workers or None,
        features=features,
        remove_columns=["path"],
        cache_file_name=f"{config.cache_dir}/mapped.arrow",
    )


def by_workers(config: DataConfig) -> list:
    each = decode_each(source_of(config)[0], decoder_of(config), config.dataloader_num_workers)
    return [image.pixels for _, image in each]


def seconds(what, *args) -> tuple[float, object]:
    began = time.perf_counter()
    result = what(*args)
    return time.perf_counter() - began, result


def read(pixels, batches) -> None:
    for indices in batches:
        pixels.index_select(0, indices)


def main() -> None:
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        for _ in range(ROUNDS):
            for workers in (0, 2):
                with tempfile.TemporaryDirectory() as cache:
                    settings = {"train_data_dir": folder, "output_dir": "elsewhere", "cache_dir": cache}
                    config = DataConfig(**settings, dataloader_num_workers=workers)
                    for name, contestant in (("map", by_map), ("workers", by_workers), ("store", load_images)):
                        took, _ = seconds(contestant, config)
                        found.setdefault(f"{name}, {workers} workers: seconds", []).append(took)
                    took, (images, _) = seconds(load_images, config)
                    found.setdefault("store, second run: seconds", []).append(took)
                    batches = torch.randperm(len(images)).split(BATCH)
                    for name, pixels in (("views", images.pixels), ("tensor", images.pixels[:])):
                        took = seconds(read, pixels, batches)[0] / len(images) * 1e6
                        found.setdefault(f"reading, {name}: microseconds an image", []).append(took)
    for name, values in found.items():
        print(f"{name:45} {' '.join(f'{value:8.2f}' for value in values)}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
