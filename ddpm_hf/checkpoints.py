"""What a run goes on from, and the pipeline folder that it leaves."""

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

from ddpm_hf.config import TrainConfig
from ddpm_hf.ema import EMA
from ddpm_hf.files import (
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
REPLACED, SUPERSEDED, NAMES = ".replaced", "superseded", ".names.json"
TRAIN_CONFIG, LOG = "train_config.json", "log.csv"
# What a run writes before its first checkpoint, and what it writes besides
QUARANTINE, QUARANTINE_HEADER = "quarantine.csv", "path,reason"
EARLY = (TRAIN_CONFIG, LOG, "data.png", "first_samples.png", QUARANTINE)
LATER = ("samples.png", "denoising.gif", "forward.png", "loss.png", "neighbours.png", "run.json")
INDEX = "model_index.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
log = logging.getLogger(__name__)


OTHERWISE = "choose another output_dir, or give --overwrite_output_dir to replace it"


class Damaged(Exception):  # noqa: N818
    """What is wrong with a checkpoint."""


class Checkpoints:
    """The folders `checkpoint-<step>` of a run: raw and averaged weights, AdamW's moments and the update's number.

    All else that a run goes on from is a function of that number (but the scale of float16's losses and the place in a
    stream, which stand beside it). No file is a pickle. A folder is written beside and renamed, and renamed before it
    is removed: one that bears the name is whole, unless the disk has lost something, which its checksums tell. Nothing
    that was there before a run is removed until the run has a whole checkpoint of its own.
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

    def find(self, config: TrainConfig) -> list[Path]:
        """The checkpoint that `resume_from_checkpoint` names, or of `latest` all, newest first; [] for a fresh start.

        Raises:
            ValueError: there is no such checkpoint; or the folder holds a model that this run would replace, and
                `overwrite_output_dir` is not set.
        """
        wanted, found = config.resume_from_checkpoint, self.found()
        if wanted == "latest" and found:
            return found[::-1]
        paths = []
        if wanted not in (None, "latest"):
            here = self.folder / wanted  # before a folder of that name in the working directory
            paths = [here if (here / "state.json").is_file() else Path(wanted)]
            if not (paths[0] / "state.json").is_file():
                there = ", ".join(f.name for f in found) or "none"
                raise ValueError(
                    f"resume_from_checkpoint={wanted!r} is no checkpoint; in {self.folder} there is {there}"
                )
        if not config.overwrite_output_dir and not any(self._is_here(path) for path in paths):
            self._check_free()
        if wanted == "latest":
            log.warning(f"{self.folder} holds no checkpoint yet: starting from the beginning")
        return paths

    def _is_here(self, path: Path) -> bool:
        return path.parent.resolve() == self.folder.resolve()  # also of a link to where there is more room

    def restore(
        self, config: TrainConfig, paths: list[Path], check: Callable[[dict], None], unet, ema: EMA, optimizer
    ) -> dict:
        """Load the first of `paths`, as `find` gives them, that is whole; returns what was saved beside the weights.

        `step` in it is the update to go on from, 0 for a fresh start, and `kept` the same if the checkpoint is of this
        folder, whose files then belong to this run; None otherwise.

        Args:
            check: called with what was saved beside the weights, before they are loaded: raises ValueError if this run
                can't go on from it.

        Raises:
            ValueError: all are damaged, or of another run.
        """
        for path, before in zip_longest(paths, paths[1:]):
            try:
                state = self._load(path, unet, ema, optimizer, check)
                return {**state, "kept": state["step"] if self._is_here(path) else None}
            except Damaged as error:
                if before is None and len(paths) == 1 and config.resume_from_checkpoint != "latest":
                    raise ValueError(f"{path} is damaged ({error}); name an earlier checkpoint") from error
                log.warning(f"{path} is damaged ({error}){': taking the one before' if before else ''}")
        if paths and not config.overwrite_output_dir:
            raise ValueError(f"all checkpoints in {self.folder} are damaged; start anew with --overwrite_output_dir")
        return {"step": 0, "kept": None}

    def _check_free(self) -> None:
        """A ValueError if a run that begins here would replace a model or the files of somebody else."""
        found = self.found()
        if found:
            try:
                state = self._state(found[-1])
                finished, of = state["step"] >= state["total_steps"], state["total_steps"]
            except Damaged:
                finished, of = False, "an unknown number"
            what = f"a finished run ({found[-1].name})" if finished else f"an unfinished run ({found[-1].name} of {of})"
            advice = "go on with --resume_from_checkpoint latest, "
            raise ValueError(f"output_dir={str(self.folder)!r} holds {what}: {advice}{OTHERWISE}")
        if held := self._model_file():
            raise ValueError(f"output_dir={str(self.folder)!r} holds a model ({held}): {OTHERWISE}")
        if not (self.folder / TRAIN_CONFIG).exists():  # else a run that ended before its first checkpoint wrote them
            for name in (*EARLY, *LATER):
                if (self.folder / name).exists() and not is_quarantine(self.folder / name):
                    raise ValueError(
                        f"output_dir={str(self.folder)!r} holds {name}, which training would replace: {OTHERWISE}"
                    )

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
        raw, average, moments = weights
        _load_weights(unet, raw, path)
        _load_weights(ema.model, average, path)
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad and moments:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: moments[f"{key}/{name}"] for key in keys}
        return state

    def roll_back(self) -> None:
        """Put back what a run replaced that ended before its first checkpoint.

        `.replaced` holds what was moved there so far, and a list of all that was to be moved. What is in the folder is
        of the run that replaces if it is not on the list, or if that of the same name has been moved. So it does not
        matter at which of the renames a process was killed, here or in `make_room`.
        """
        replaced = self.folder / REPLACED
        if not replaced.is_dir():
            return
        listed = replaced / NAMES
        names = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
        if any(path.name not in names or (replaced / path.name).exists() for path in self.found()):
            return remove_tree(replaced)  # it has a checkpoint, and was killed before it came to this
        for name in names:
            if (replaced / name).exists():
                os.replace(replaced / name, self.folder / name)
        for name in set(EARLY) - set(names):
            (self.folder / name).unlink(missing_ok=True)
        remove_tree(replaced)

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
                (self.folder / REPLACED).mkdir(exist_ok=True)
                write(self.folder / REPLACED / NAMES, json.dumps([path.name for path in (*early, *later)]))
                for path in (*early, *later):
                    os.replace(path, self.folder / REPLACED / path.name)
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
        with writing_tree(Path(folder)):
            run.pipeline.save_pretrained(folder)
            run.unet.save_pretrained(Path(folder) / "unet", variant="raw")
        for path in sorted(Path(folder).rglob("*")):
            target = run.output_dir / path.relative_to(folder)
            target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)
        for name in ("safetensors.index.json", "safetensors.index.raw.json"):
            # Of a model in several files that was here before: diffusers would load that one in place of this
            (run.output_dir / "unet" / f"diffusion_pytorch_model.{name}").unlink(missing_ok=True)
        for each in (run.output_dir, run.output_dir / "unet", run.output_dir / "scheduler"):
            sync(each)
