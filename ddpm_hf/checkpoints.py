"""What a run goes on from, and the pipeline folder that it leaves."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load, save_file

from ddpm_hf.config import TrainConfig
from ddpm_hf.ema import EMA

WEIGHTS = ("unet", "ema", "optimizer")
SAVING = ".saving-"
log = logging.getLogger(__name__)


class Damaged(Exception):  # noqa: N818
    """What is wrong with a checkpoint."""


class Checkpoints:
    """The folders `checkpoint-<step>` of a run: raw and averaged weights, AdamW's moments and the update's number.

    All else that a run goes on from is a function of that number (but the scale of float16's losses and the place in a
    stream, which stand beside it). No file is a pickle. A folder is written beside and renamed, and renamed before it
    is removed: one that bears the name is whole, unless the disk has lost something, which its checksums tell.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    def found(self) -> list[Path]:
        """Oldest first. Folders of the name that other programs wrote are none of ours."""
        named = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        files = ("state.json", *(f"{name}.safetensors" for name in WEIGHTS))
        return sorted((path for path in named if any((path / file).is_file() for file in files)), key=self._step)

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.name.split("-")[1])

    def _remove(self, path: Path) -> None:
        aside = self.folder / f".removed-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)

    def restore(self, config: TrainConfig, unet, ema: EMA, optimizer) -> dict:
        """Load what `resume_from_checkpoint` names, or of `latest` the newest that is whole; what else was saved.

        `step` in it is the update to go on from, 0 for a fresh start, and `kept` the one up to which what is in the
        folder belongs to this run.
        """
        wanted, found = config.resume_from_checkpoint, self.found()
        if wanted == "latest":
            for path in reversed(found):
                try:
                    state = self._load(path, unet, ema, optimizer)
                    return {**state, "kept": state["step"]}
                except Damaged as error:
                    log.warning(f"{path} is damaged ({error}): taking the one before")
            if found:
                raise ValueError(
                    f"all checkpoints in {self.folder} are damaged; start anew with --overwrite_output_dir"
                )
            log.warning(f"{self.folder} holds no checkpoint yet: starting from the beginning")
            return {"step": 0, "kept": 0}
        path = None
        if wanted is not None:
            path = Path(wanted) if Path(wanted).is_dir() else self.folder / wanted
            if not (path / "state.json").is_file():
                there = ", ".join(f.name for f in found) or "none"
                raise ValueError(
                    f"resume_from_checkpoint={wanted!r} is no checkpoint; in {self.folder} there is {there}"
                )
        elsewhere = path is None or path.resolve().parent != self.folder.resolve()
        if elsewhere and found and not config.overwrite_output_dir:
            self._check_finished(config, found[-1])
        try:
            state = {"step": 0} if path is None else self._load(path, unet, ema, optimizer)
        except Damaged as error:
            raise ValueError(f"{path} is damaged ({error}); name an earlier checkpoint") from error
        return {**state, "kept": 0 if elsewhere else state["step"]}

    def _check_finished(self, config: TrainConfig, newest: Path) -> None:
        try:
            state = self._state(newest)
            of, finished = state["total_steps"], state["step"] >= state["total_steps"]
        except Damaged:
            of, finished = "an unknown number", False
        if not finished:
            raise ValueError(
                f"output_dir={config.output_dir!r} holds an unfinished run ({newest.name} of {of}): go on with "
                "--resume_from_checkpoint latest, choose another folder, or give --overwrite_output_dir"
            )

    def _state(self, path: Path) -> dict:
        try:
            state = json.loads((path / "state.json").read_text())
            seal = state.pop("seal")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Damaged(f"state.json can't be read: {error}") from error
        if seal != _seal(state):
            raise Damaged("state.json is not as it was written")
        return state

    def _load(self, path: Path, unet, ema: EMA, optimizer) -> dict:
        state, weights = self._state(path), []
        for name in WEIGHTS:
            file = f"{name}.safetensors"
            try:
                content = (path / file).read_bytes()
            except OSError as error:
                raise Damaged(f"{file} can't be read: {error.strerror}") from error
            if hashlib.sha256(content).hexdigest() != state["sha256"][name]:
                raise Damaged(f"{file} is not as it was written")
            weights.append(load(content))
        raw, average, moments = weights
        _load_weights(unet, raw, path)
        _load_weights(ema.model, average, path)
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad and moments:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: moments[f"{key}/{name}"] for key in keys}
        return state

    def clear_after(self, step: int) -> None:
        """Remove the checkpoints that this run is going to write anew, and what killed ones left half done."""
        for path in self.found():
            if self._step(path) > step:
                self._remove(path)
        for pattern in (".checkpoint-*", ".removed-*", f"{SAVING}*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def save(self, step: int, total_steps: int, unet, ema: EMA, optimizer, **more) -> None:
        """Write `checkpoint-<step>` and remove the oldest ones over the limit.

        Args:
            more: what to give back as it is: JSON.

        Raises:
            FloatingPointError: weights that are not finite; what was saved before stays.
        """
        target = self.folder / f"checkpoint-{step}"
        if target in self.found():  # stopped just after a save, or resumed behind the end
            return
        for name, weight in unet.named_parameters():
            if not weight.isfinite().all():
                kept = ", ".join(path.name for path in self.found()) or "none was saved before"
                raise FloatingPointError(f"after update {step} {name} is not finite: no checkpoint is made ({kept})")
        beside = self.folder / f".{target.name}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        moments = {
            f"{key}/{name}": value
            for name, parameter in unet.named_parameters()
            for key, value in optimizer.state[parameter].items()
        }
        sums = {}
        for name, tensors in zip(WEIGHTS, (unet.state_dict(), ema.model.state_dict(), moments), strict=True):
            save_file(tensors, beside / f"{name}.safetensors")
            with open(beside / f"{name}.safetensors", "rb") as file:
                os.fsync(file.fileno())
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        state = {"step": step, "total_steps": total_steps, "sha256": sums, **more}
        with open(beside / "state.json", "w") as file:
            file.write(json.dumps({**state, "seal": _seal(state)}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        _sync_folder(self.folder)  # before an older one goes
        for path in self.found()[: -self.limit]:
            self._remove(path)


def _sync_folder(folder: Path) -> None:
    """Have the disk know the names in it."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_DIRECTORY)
        os.fsync(number)
        os.close(number)


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _load_weights(model, weights: dict, path: Path) -> None:
    wanted = model.state_dict()
    for name in sorted(weights.keys() | wanted.keys()):
        shapes = [tuple(w[name].shape) if name in w else None for w in (weights, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path} has {name} as {shapes[0]} and the network wants {shapes[1]}: it is of another one"
            )
    model.load_state_dict(weights)


def save_pipeline(run) -> None:
    """The pipeline folder of a `Run`: the averaged weights, and the raw ones as `variant="raw"`.

    It is written beside and moved file by file, so a reader never meets half a file.
    """
    with tempfile.TemporaryDirectory(dir=run.output_dir, prefix=SAVING) as folder:
        run.pipeline.save_pretrained(folder)
        run.unet.save_pretrained(Path(folder) / "unet", variant="raw")
        for path in sorted(Path(folder).rglob("*")):
            target = run.output_dir / path.relative_to(folder)
            target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)
