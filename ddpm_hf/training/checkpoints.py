"""Checkpoints of a training run, and the pipeline folder that it leaves."""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

from safetensors.torch import load

from ddpm_hf.training.ema import EMA
from ddpm_hf.utils.files import (
    clear_parts,
    free_name,
    remove,
    remove_tree,
    save_tensors,
    set_aside,
    sync,
    write,
    writing_tree,
)

WEIGHTS = ("unet", "ema", "optimizer")
SAVING = ".saving-"
REPLACING, REPLACED, SUPERSEDED = ".replacing", ".replaced", "superseded"
TRAIN_CONFIG, LOG = "train_config.json", "log.csv"
# What a run writes before its first checkpoint, and what it writes besides
QUARANTINE, QUARANTINE_HEADER = "quarantine.csv", "path,reason"
EARLY = (TRAIN_CONFIG, LOG, "data.png", "first_samples.png", QUARANTINE)
LATER = ("samples.png", "denoising.gif", "forward.png", "loss.png", "neighbours.png", "run.json")
INDEX = "model_index.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
log = logging.getLogger(__name__)


class Damaged(Exception):  # noqa: N818
    """What is wrong with a checkpoint."""


class Checkpoints:
    """The folders `checkpoint-<step>` of a run: training and EMA weights, AdamW's moments and the update's number.

    All else that a run goes on from is a function of that number (but the scale of float16's losses and the place in a
    stream, which stand beside it). No file is a pickle. A folder is written beside and renamed, and renamed before it
    is removed: one that bears the name is whole, unless the disk has lost something, which its checksums tell. Nothing
    that was there before a run is removed until the run has a whole checkpoint of its own.

    Args:
        folder: the run's `output_dir`.
        limit: checkpoints to keep.
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

    def find(self, resume_from_checkpoint: str | None, overwrite_output_dir: bool) -> list[Path]:
        """The checkpoint that `resume_from_checkpoint` names, or of `latest` all, newest first; [] for a fresh start.

        Raises:
            ValueError: there is no such checkpoint; or the folder holds a model that this run would replace, and
                `overwrite_output_dir` is not set.
        """
        found, paths = self.found(), []
        if resume_from_checkpoint == "latest" and found:
            return found[::-1]
        if resume_from_checkpoint not in (None, "latest"):
            # In this folder before one of that name in the working directory
            named = (self.folder / resume_from_checkpoint, Path(resume_from_checkpoint))
            paths = [path for path in named if (path / "state.json").is_file()][:1]
            if not paths:
                there = ", ".join(path.name for path in found) or "none"
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} is no checkpoint; in {self.folder} there is "
                    f"{there}"
                )
        if not overwrite_output_dir and not any(map(self._is_here, paths)) and (held := self._held()):
            raise ValueError(
                f"output_dir={str(self.folder)!r} holds {held}; choose another output_dir, or give "
                "--overwrite_output_dir to replace it"
            )
        if resume_from_checkpoint == "latest":
            log.warning(f"{self.folder} holds no checkpoint yet: starting from the beginning")
        return paths

    def _is_here(self, path: Path) -> bool:
        return path.parent.resolve() == self.folder.resolve()  # also of a link to where there is more room

    def restore(
        self, paths: list[Path], check: Callable[[dict], None], unet, ema: EMA, optimizer, start_anew: bool
    ) -> dict:
        """Load the first of `paths`, as `find` gives them, that is whole; returns what was saved beside the weights.

        `step` in it is the update to go on from, 0 for a fresh start, and `kept` the same if the checkpoint is of this
        folder, whose files then belong to this run; None otherwise.

        Args:
            check: called with what was saved beside the weights, before they are loaded: raises ValueError if this run
                can't go on from it.
            start_anew: whether to begin at update 0 if all are damaged.

        Raises:
            ValueError: all are damaged, or of another run.
        """
        for path, before in zip_longest(paths, paths[1:]):
            try:
                state = self._load(path, unet, ema, optimizer, check)
                return {**state, "kept": state["step"] if self._is_here(path) else None}
            except Damaged as error:
                if before is None and not start_anew:
                    raise ValueError(
                        f"{path} is damaged ({error}), and there is no other checkpoint to take: name one with "
                        "--resume_from_checkpoint, or start anew with --overwrite_output_dir"
                    ) from error
                log.warning(f"{path} is damaged ({error}){': taking the one before' if before else ''}")
        return {"step": 0, "kept": None}

    def _held(self) -> str | None:
        """What is in the folder, in words, that a run that begins here would replace; None if there is nothing."""
        if found := self.found():
            try:
                state = self._state(found[-1])
            except Damaged:
                state = {"step": -1, "total_steps": 0}
            finished, of = state["step"] >= state["total_steps"], state["total_steps"] or "an unknown number"
            run = f"a finished run ({found[-1].name})" if finished else f"an unfinished run ({found[-1].name} of {of})"
            return f"{run}: go on with --resume_from_checkpoint latest"
        if model := self._model_file():
            return f"a model ({model})"
        if (self.folder / TRAIN_CONFIG).exists():  # of a run that ended before its first checkpoint, as all else is
            return None
        there = (name for name in (*EARLY, *LATER) if (self.folder / name).exists())
        theirs = next((name for name in there if not is_quarantine(self.folder / name)), None)
        return theirs and f"{theirs}, which training would replace"

    def _model_file(self) -> str | None:
        """The name of a file that tells that the folder holds a model, of whatever kind."""
        if (self.folder / INDEX).exists():
            return INDEX
        weights = (
            path
            for pattern in ("*", "unet/*", "checkpoint-*/*")
            for path in sorted(self.folder.glob(pattern))
            if path.suffix in WEIGHT_FILES and not path.relative_to(self.folder).parts[0].startswith(".")
        )
        return next((path.relative_to(self.folder).as_posix() for path in weights), None)

    def _state(self, path: Path) -> dict:
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            seal = state.pop("seal")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise Damaged(f"state.json can't be read: {error}") from error
        if seal != _seal(state):
            raise Damaged("state.json is not as it was written")
        return state

    def _load(self, path: Path, unet, ema: EMA, optimizer, check: Callable[[dict], None]) -> dict:
        state, weights = self._state(path), []
        check(state)
        for name in WEIGHTS:
            file = f"{name}.safetensors"
            try:
                content = (path / file).read_bytes()
            except OSError as error:
                raise Damaged(f"{file} can't be read: {error.strerror}") from error
            if hashlib.sha256(content).hexdigest() != state["sha256"][name]:
                raise Damaged(f"{file} is not as it was written")
            weights.append(load(content))
        of_training, of_ema, moments = weights
        for model, tensors in ((unet, of_training), (ema.model, of_ema)):
            try:
                model.load_state_dict(tensors)
            except RuntimeError as error:  # its first line names the class
                raise ValueError(f"{path} is of another network: {str(error).splitlines()[-1].strip()}") from error
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad and moments:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: moments[f"{key}/{name}"] for key in keys}
        return state

    def roll_back(self) -> None:
        """Put back what a run replaced that ended before its first checkpoint.

        While `.replacing` is there, files are moved into it or back, and all that is in the folder was there before.
        While `.replaced` is there, all has been moved, and what is in the folder is of the run that replaces. So it
        does not matter at which of the renames a process was killed, here or in `make_room`.
        """
        replacing, replaced = self.folder / REPLACING, self.folder / REPLACED
        if replaced.is_dir():
            if self.found():  # the run was killed after it had saved the first one
                return remove_tree(replaced)
            for name in EARLY:
                (self.folder / name).unlink(missing_ok=True)
            os.replace(replaced, replacing)
        if replacing.is_dir():
            for path in replacing.iterdir():
                os.replace(path, self.folder / path.name)
            replacing.rmdir()

    def make_room(self, kept: int | None) -> None:
        """Before a run begins (`kept` is None) or goes on at update `kept`: clear away what killed runs left half done.

        What this run replaces waits in a folder of its own until the first new checkpoint is whole. Checkpoints of
        later updates than `kept` are never removed: they are moved to the folder `superseded`, with the log.
        """
        for pattern in (".checkpoint-*", ".removed-*", f"{SAVING}*"):
            for path in self.folder.glob(pattern):
                remove(path)
        clear_parts(self.folder)
        later = [path for path in self.found() if kept is None or self._step(path) > kept]
        if kept is None:
            early = [self.folder / name for name in EARLY if (self.folder / name).exists()]
            if later or self._model_file():
                (self.folder / REPLACING).mkdir()
                for path in (*early, *later):
                    os.replace(path, self.folder / REPLACING / path.name)
                os.replace(self.folder / REPLACING, self.folder / REPLACED)
        elif later:
            superseded = self.folder / SUPERSEDED
            superseded.mkdir(exist_ok=True)
            if (self.folder / LOG).exists():
                shutil.copyfile(self.folder / LOG, free_name(superseded / LOG))
            for path in later:
                aside = free_name(superseded / path.name)
                os.replace(path, aside)
                log.warning(
                    f"{path} is of a later update than {kept}, from which this run goes on: moved to {aside}; "
                    "move it back to go on from it"
                )

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
        if target.exists():
            set_aside(target, "it is no checkpoint of ours")
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
            save_tensors(tensors, beside / f"{name}.safetensors")
            with open(beside / f"{name}.safetensors", "rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        state = {"step": step, "total_steps": total_steps, "sha256": sums, **more}
        write(beside / "state.json", json.dumps({**state, "seal": _seal(state)}, indent=2) + "\n")
        os.replace(beside, target)
        sync(self.folder)  # before an older one goes
        if (self.folder / REPLACED).is_dir():
            remove_tree(self.folder / REPLACED)
        for path in self.found()[: -self.limit]:
            remove_tree(path)


def is_quarantine(path: Path) -> bool:
    """Whether this is a list of broken images that a run of ours wrote."""
    try:
        return path.name == QUARANTINE and path.read_text(encoding="utf-8").startswith(QUARANTINE_HEADER)
    except (OSError, UnicodeDecodeError):
        return False


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def save_pipeline(folder: Path, pipeline, unet) -> None:
    """Save a pipeline folder: the EMA weights, which `pipeline` has, and those of `unet` in training as variant "raw".

    It is written beside and moved file by file, so a reader never meets half a file.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as beside:
        beside = Path(beside)
        with writing_tree(beside):
            pipeline.save_pretrained(beside)
            unet.save_pretrained(beside / "unet", variant="raw")
        for path in sorted(beside.rglob("*")):
            target = folder / path.relative_to(beside)
            target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)
    for name in ("safetensors.index.json", "safetensors.index.raw.json"):
        # Of a model in several files that was here before: diffusers would load that one in place of this
        (folder / "unet" / f"diffusion_pytorch_model.{name}").unlink(missing_ok=True)
    for each in (folder, folder / "unet", folder / "scheduler"):
        sync(each)
