"""Saves and restores the checkpoints of a training run, and saves its pipeline folder."""

import contextlib
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
from ddpm_hf.utils.arguments import NOT_FINITE, OF_THE_MACHINE, read_json
from ddpm_hf.utils.checksums import file_sha256
from ddpm_hf.utils.files import (
    clear_parts,
    free_name,
    link_or_copy,
    os_errors_of,
    remove,
    remove_tree,
    save_tensors,
    set_aside,
    sync,
    write,
    writing_tree,
)

WEIGHTS, POST_HOC = ("unet", "ema", "optimizer"), "post_hoc"  # files, the last one with `post_hoc_ema`
AVERAGES = "averages"  # folder of a checkpoint: those of `EMA.averages` at several saves, a file each
MOST_STATE_BYTES = 2**26  # of state.json, which lists the broken images of a stream
SAVING = ".saving-"
REPLACING, REPLACED, SUPERSEDED = ".replacing", ".replaced", "superseded"
TRAIN_CONFIG, LOG = "train_config.json", "log.csv"
# Files that a run writes before its first checkpoint, and others
QUARANTINE, QUARANTINE_HEADER = "quarantine.csv", "path,reason"
EARLY = (TRAIN_CONFIG, LOG, "data.png", "first_samples.png", QUARANTINE)
LATER = ("samples.png", "denoising.gif", "forward.png", "loss.png", "neighbours.png", "run.json")
INDEX = "model_index.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
log = logging.getLogger(__name__)


class Damaged(Exception):  # noqa: N818
    """A checkpoint is damaged; the message says how."""


class Checkpoints:
    """The folders `checkpoint-<step>` of a run: training weights, EMA weights, the optimizer's moments and state.json.

    With `post_hoc_ema` they also have the averages of this and of earlier saves, in files that the checkpoints of a run
    share (hard links). Apart from the loss scale of float16 and the position in a stream, which state.json holds, all
    other state is a function of the step. No file is a pickle. Folders are written under another name and renamed when
    complete, and checksums detect damage. A run removes nothing that it replaces before its first checkpoint is
    complete.

    Args:
        folder: the `output_dir` of the run.
        limit: number of checkpoints to keep.
        averages_limit: number of saves whose averages the newest checkpoint has.
    """

    def __init__(self, folder: Path, limit: int, averages_limit: int = 2):
        self.folder, self.limit, self.averages_limit = folder, limit, averages_limit
        self.averages: dict[int, tuple[Path, str]] = {}  # of the checkpoint before: file and checksum by update

    def found(self) -> list[Path]:
        """The checkpoints, oldest first, without folders of that name that other programs wrote."""
        named = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        files = ("state.json", *(f"{name}.safetensors" for name in WEIGHTS))
        return sorted((path for path in named if any((path / file).is_file() for file in files)), key=self._step)

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.name.split("-")[1])

    def find(self, resume_from_checkpoint: str | None, overwrite_output_dir: bool) -> list[Path]:
        """The checkpoints to try, in order: the one named, or for `latest` all, newest first; [] to start from scratch.

        Raises:
            ValueError: the checkpoint does not exist; or the folder has a model that this run would replace and
                `overwrite_output_dir` is false.
        """
        found, paths = self.found(), []
        if resume_from_checkpoint == "latest" and found:
            return found[::-1]
        if resume_from_checkpoint not in (None, "latest"):
            # a name in this folder takes precedence over a path
            named = (self.folder / resume_from_checkpoint, Path(resume_from_checkpoint))
            paths = [path for path in named if (path / "state.json").is_file()][:1]
            if not paths:
                there = ", ".join(path.name for path in found) or "none"
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} is not a checkpoint; the checkpoints in "
                    f"{self.folder}: {there}"
                )
        if not overwrite_output_dir and not any(map(self._is_here, paths)) and (held := self._held()):
            raise ValueError(
                f"output_dir={str(self.folder)!r} contains {held}; choose another output_dir, or give "
                "--overwrite_output_dir to replace it"
            )
        if resume_from_checkpoint == "latest":
            log.warning(f"{self.folder} has no checkpoint: training starts from scratch")
        return paths

    def _is_here(self, path: Path) -> bool:
        return path.parent.resolve() == self.folder.resolve()  # also if the checkpoint is a link to another disk

    def restore(
        self, paths: list[Path], check: Callable[[dict], None], unet, ema: EMA, optimizer, start_anew: bool
    ) -> dict:
        """Load the first undamaged checkpoint of `paths`, which are from `find`, and return its state.json.

        `step` in it is the update to resume from, 0 for a run from scratch. `kept` is the same if the checkpoint is in
        this folder, whose other files then belong to this run, and otherwise None.

        Args:
            check: called with the content of state.json before weights are loaded; raises ValueError if this run can't
                resume from it.
            start_anew: start from scratch if all checkpoints are damaged.

        Raises:
            ValueError: all checkpoints are damaged, or they are of another run.
        """
        for path, before in zip_longest(paths, paths[1:]):
            try:
                state = self._load(path, unet, ema, optimizer, check)
                return {**state, "kept": state["step"] if self._is_here(path) else None}
            except Damaged as error:
                if before is None and not start_anew:
                    raise ValueError(
                        f"{path} is damaged ({error}), and there is no other checkpoint to resume from: name one with "
                        "--resume_from_checkpoint, or start from scratch with --overwrite_output_dir"
                    ) from error
                log.warning(f"{path} is damaged ({error}){': trying the previous one' if before else ''}")
        return {"step": 0, "kept": None}

    def first_state(self, paths: list[Path]) -> dict | None:
        """The first state.json of `paths` that can be read; None without one."""
        for path in paths:
            with contextlib.suppress(Damaged):
                return self._state(path)
        return None

    def _held(self) -> str | None:
        """Describe what a new run would replace in the folder; None if nothing."""
        if found := self.found():
            try:
                state = self._state(found[-1])
            except Damaged:
                state = {"step": -1, "total_steps": 0}
            finished, of = state["step"] >= state["total_steps"], state["total_steps"] or "an unknown number"
            run = f"a finished run ({found[-1].name})" if finished else f"an unfinished run ({found[-1].name} of {of})"
            return f"{run}: resume it with --resume_from_checkpoint latest"
        if model := self._model_file():
            return f"a model ({model})"
        if (self.folder / TRAIN_CONFIG).exists():  # all files are of a run that ended before its first checkpoint
            return None
        there = (name for name in (*EARLY, *LATER) if (self.folder / name).exists())
        theirs = next((name for name in there if not is_quarantine(self.folder / name)), None)
        return theirs and f"{theirs}, which training would replace"

    def _model_file(self) -> str | None:
        """The name of a file that shows that the folder contains a model of any kind, or None."""
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
            state = read_json(path / "state.json", MOST_STATE_BYTES, NOT_FINITE)
        except ValueError as error:
            raise Damaged(str(error).replace(f"{path}{os.sep}", "")) from error  # who logs it names the folder
        if state.pop("seal", None) != _seal(state):
            raise Damaged("state.json has a wrong checksum")
        return state

    def _load(self, path: Path, unet, ema: EMA, optimizer, check: Callable[[dict], None]) -> dict:
        state, weights = self._state(path), []
        check(state)
        for name in (*WEIGHTS, *([POST_HOC] if ema.post_hoc else [])):
            file = f"{name}.safetensors"
            try:
                content = (path / file).read_bytes()
            except OSError as error:
                if error.errno in OF_THE_MACHINE:
                    raise
                raise Damaged(f"{file} can't be read: {error.strerror}") from error
            if hashlib.sha256(content).hexdigest() != state["sha256"].get(name):
                raise Damaged(f"{file} has a wrong checksum")
            weights.append(load(content))
        of_training, of_ema, moments, *averages = weights
        for model, tensors in ((unet, of_training), (ema.model, of_ema)):
            try:
                model.load_state_dict(tensors)
            except RuntimeError as error:  # its first line names the class
                raise ValueError(f"{path} is of another network: {str(error).splitlines()[-1].strip()}") from error
        parameters = dict(unet.named_parameters())
        for name, tensor in moments.items():
            key, _, of = name.partition("/")
            optimizer.state[parameters[of]][key] = tensor
        if averages:
            for name, average in ema.averages().items():
                average.copy_(averages[0][name])
            self.averages = _averages(path, state)
        return state

    def newest_averages(self) -> dict[int, Path]:
        """The files of averages in the newest undamaged checkpoint, by update; {} without any."""
        for path in reversed(self.found()):
            try:
                found = _averages(path, self._state(path))
                for file, checksum in found.values():
                    if not file.is_file() or file_sha256(file) != checksum:
                        raise Damaged(f"{AVERAGES}/{file.name} is missing or has a wrong checksum")
            except Damaged as error:
                log.warning(f"{path} is damaged ({error})")
                continue
            if found:
                return {step: file for step, (file, _) in found.items()}
        return {}

    def _keep_averages(self, folder: Path, step: int, ema: EMA) -> dict[str, str]:
        """Save the averages in a new checkpoint, with those of earlier saves, and return their checksums by update.

        They are in half precision, whose rounding is small beside what `post_hoc.coefficients` leaves.
        """
        self.averages.pop(step, None)  # of a checkpoint elsewhere from which the run began
        new = folder / AVERAGES / f"{step}.safetensors"
        new.parent.mkdir()
        save_tensors({name: average.half() for name, average in ema.averages().items()}, new)
        sums = {step: file_sha256(new)}
        for kept in thin([*self.averages, step], self.averages_limit)[:-1]:
            before, checksum = self.averages[kept]
            if before.is_file():
                link_or_copy(before, new.with_name(before.name))
                sums[kept] = checksum
            else:
                log.warning(f"{before} is gone: averages of other lengths are made without that save")
        return {str(kept): sums[kept] for kept in sorted(sums)}

    def roll_back(self) -> None:
        """Restore what a run replaced if it ended before its first checkpoint.

        While `.replacing` exists, files are being moved into it or back, and all files are of the old run. While
        `.replaced` exists, all have been moved, and the other files are of the new run. So a process may be killed at
        any of the renames, here or in `make_room`.
        """
        replacing, replaced = self.folder / REPLACING, self.folder / REPLACED
        if replaced.is_dir():
            if self.found():  # the new run was killed after its first checkpoint
                return remove_tree(replaced)
            for name in EARLY:
                (self.folder / name).unlink(missing_ok=True)
            os.replace(replaced, replacing)
        if replacing.is_dir():
            for path in replacing.iterdir():
                os.replace(path, self.folder / path.name)
            replacing.rmdir()

    def make_room(self, kept: int | None) -> None:
        """Prepare the folder for a run from scratch (`kept` is None) or from update `kept`; remove partial files.

        What the run replaces stays in a hidden folder until its first checkpoint is complete. Checkpoints of later
        updates than `kept` are moved to the folder `superseded` with a copy of the log.
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
                    f"{path} is later than update {kept}, from which this run resumes, and was moved to {aside}; "
                    "move it back to resume from it"
                )

    def save(self, step: int, total_steps: int, unet, ema: EMA, optimizer, **more) -> None:
        """Write `checkpoint-<step>` and remove the oldest checkpoints beyond the limit.

        Args:
            more: more content of state.json.

        Raises:
            FloatingPointError: weights are not finite; earlier checkpoints stay.
        """
        target = self.folder / f"checkpoint-{step}"
        if target in self.found():  # stopped just after a save, or finished before
            return
        if target.exists():
            set_aside(target, "it is not a checkpoint of this package")
        for name, weight in unet.named_parameters():
            if not weight.isfinite().all():
                kept = ", ".join(path.name for path in self.found()) or "none before"
                raise FloatingPointError(f"after update {step} {name} is not finite: no checkpoint was saved ({kept})")
        moments = {
            f"{key}/{name}": value
            for name, parameter in unet.named_parameters()
            for key, value in optimizer.state[parameter].items()
        }
        tensors = dict(zip(WEIGHTS, (unet.state_dict(), ema.model.state_dict(), moments), strict=True))
        state = {"step": step, "total_steps": total_steps, **more}
        if ema.post_hoc:
            tensors[POST_HOC] = ema.averages()
        beside = self.folder / f".{target.name}"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            beside.mkdir()
            if ema.post_hoc:
                state["averages"] = self._keep_averages(beside, step, ema)
            _write(beside, tensors, state)
            os.replace(beside, target)
            self.averages = _averages(target, state)
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # if something failed
        sync(self.folder)  # before older ones are removed
        if (self.folder / REPLACED).is_dir():
            remove_tree(self.folder / REPLACED)
        for path in self.found()[: -self.limit]:
            remove_tree(path)


def _write(folder: Path, tensors: dict[str, dict], state: dict) -> None:
    """Write the weights and state.json of a checkpoint."""
    sums = {}
    for name, content in tensors.items():
        path = folder / f"{name}.safetensors"
        save_tensors(content, path)
        sums[name] = file_sha256(path)
    state = {**state, "sha256": sums}
    write(folder / "state.json", json.dumps({**state, "seal": _seal(state)}, indent=2) + "\n")


def _averages(checkpoint: Path, state: dict) -> dict[int, tuple[Path, str]]:
    folder = checkpoint / AVERAGES
    return {
        int(step): (folder / f"{step}.safetensors", checksum) for step, checksum in state.get("averages", {}).items()
    }


def thin(steps: list[int], most: int) -> list[int]:
    """Of the updates of some saves keep `most`, the last one among them, which are spread as evenly as they can be."""
    steps = sorted(steps)
    while len(steps) > most:
        gaps = [after - before for before, after in zip([0, *steps], steps[1:])]  # that each but the last would leave
        del steps[gaps.index(min(gaps))]
    return steps


def is_quarantine(path: Path) -> bool:
    """Whether this is a list of broken images written by a run."""
    try:
        return path.name == QUARANTINE and path.read_text(encoding="utf-8").startswith(QUARANTINE_HEADER)
    except (OSError, UnicodeDecodeError):
        return False


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def save_pipeline(folder: Path, pipeline, unet) -> None:
    """Save a pipeline folder: the EMA weights in `pipeline`, and the training weights in `unet` as variant "raw".

    Files are written under other names and renamed when complete, so a reader never sees a partial file.
    """
    with os_errors_of(folder), tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as beside:
        beside = Path(beside)
        with writing_tree(beside):
            pipeline.save_pretrained(beside)
            unet.save_pretrained(beside / "unet", variant="raw")
        for path in sorted(beside.rglob("*")):
            target = folder / path.relative_to(beside)
            target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)
    for name in ("safetensors.index.json", "safetensors.index.raw.json"):
        # diffusers would load an earlier sharded model instead of this one
        (folder / "unet" / f"diffusion_pytorch_model.{name}").unlink(missing_ok=True)
    for each in (folder, folder / "unet", folder / "scheduler"):
        sync(each)
