"""Uploading a run to the Hugging Face Hub while it trains."""

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import HFValidationError

from ddpm_hf.hub.push import check_right_to_push, files_in, files_of, push_command, upload
from ddpm_hf.utils.files import part_of

log = logging.getLogger(__name__)


class PushInBackground:
    """Uploads a `Run`: call `check` before its training, the object itself after each save, `finish` at the end.

    After a save the training waits only for the disk: a thread of its own uploads a copy. While an upload is under way,
    later saves are skipped. A failed upload is logged; training continues. Only the last one, when training is done,
    raises ValueError if it fails.
    """

    def __init__(self):
        self.repo_id, self.thread = None, None

    def check(self, run) -> None:
        """Before training: raise ValueError if uploads would fail for want of a login, a right or a valid name."""
        name = run.config.hub_model_id or run.output_dir.resolve().name
        try:
            self.repo_id = check_right_to_push(name, run.config.hub_private_repo)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={name!r}: {error}") from error

    def __call__(self, run) -> None:
        if run.finished or (self.thread is not None and self.thread.is_alive()):
            return
        try:
            upload_staged = self._stage(run)
        except Exception as error:  # a full disk, a card that can't be made
            return log.warning(f"training goes on, but update {run.step} can't be uploaded: {error}")
        # A daemon, as a stopped run does not wait for its upload
        self.thread = threading.Thread(target=_warn_of_failure, args=[upload_staged], daemon=True)
        self.thread.start()

    def finish(self, run) -> None:
        """After training, if it is done: upload the final model, and print the commit's address."""
        if not run.finished:
            return
        if self.thread is not None:
            self.thread.join()
        try:
            print(self._stage(run)(), flush=True)
        except ValueError as error:
            raise ValueError(f"the model is trained and saved in {run.output_dir}, but {error}") from error

    def _stage(self, run) -> Callable[[], str]:
        """Copy what is to be uploaded, without asking the Hub, and return a function that uploads the copy."""
        # The next training in the folder removes the copy if this process is killed
        prefix = f"{part_of(run.output_dir / 'upload').name}-"
        staged = tempfile.TemporaryDirectory(dir=run.output_dir, prefix=prefix, ignore_cleanup_errors=True)
        folder = Path(staged.name) / run.output_dir.resolve().name
        for name, source in files_in(run.output_dir).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        files, private = files_of(folder, run.pipeline, self.repo_id), run.config.hub_private_repo
        message, again = f"Train for {run.step} updates", push_command(run.output_dir, self.repo_id, private=private)

        def upload_staged() -> str:
            with staged:
                return upload(files, self.repo_id, message, again, private)

        return upload_staged


def _warn_of_failure(call: Callable) -> None:
    try:
        call()
    except Exception as error:
        log.warning(f"training goes on, but {error}")
