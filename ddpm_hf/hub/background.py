"""Uploading a model to the Hugging Face Hub during training."""

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import HFValidationError

from ddpm_hf.hub.contents import files_in, files_of
from ddpm_hf.hub.push import check_right_to_push, retry_hint
from ddpm_hf.hub.upload import upload
from ddpm_hf.utils.files import part_of

log = logging.getLogger(__name__)


class PushInBackground:
    """Uploads the model of a `Run`: call `check` before training, the object after each save, and `finish` at the end.

    Training waits only for a local copy of the files, which a thread uploads. Saves during an upload are not uploaded.
    A failed upload is logged; training continues. The final upload raises ValueError if it fails.
    """

    def __init__(self):
        self.repo_id, self.thread = None, None

    def check(self, run) -> None:
        """Raise ValueError if there is no login, no right to write, or no valid name."""
        name = run.config.hub_model_id or run.output_dir.resolve().name
        try:
            self.repo_id = check_right_to_push(name, run.config.hub_private_repo)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={name!r}: {error}") from error

    def __call__(self, run) -> None:
        """Upload a save, unless it is the final one or another upload is running."""
        if run.finished or (self.thread is not None and self.thread.is_alive()):
            return
        try:
            upload_copy = self._copy(run)
        except Exception as error:  # for instance a full disk, or a model card that could not be made
            return log.warning(f"update {run.step} could not be uploaded; training continues: {error}")
        # A daemon, so that a stopped run exits without waiting for its upload
        self.thread = threading.Thread(target=_warn_of_failure, args=[upload_copy], daemon=True)
        self.thread.start()

    def finish(self, run) -> None:
        """If training is finished, upload the final model and print the address of the commit."""
        if not run.finished:
            return
        if self.thread is not None:
            self.thread.join()
        try:
            print(self._copy(run)(), flush=True)
        except ValueError as error:
            raise ValueError(f"the trained model is saved in {run.output_dir}, but {error}") from error

    def _copy(self, run) -> Callable[[], str]:
        """Copy the files without a request to the Hub, and return a function that uploads the copy."""
        # The next training in this folder removes the copy if this process is killed
        prefix = f"{part_of(run.output_dir / 'upload').name}-"
        staged = tempfile.TemporaryDirectory(dir=run.output_dir, prefix=prefix, ignore_cleanup_errors=True)
        folder = Path(staged.name) / run.output_dir.resolve().name
        for name, source in files_in(run.output_dir).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        files, private = files_of(folder, run.pipeline, self.repo_id), run.config.hub_private_repo
        message, hint = f"Train for {run.step} updates", retry_hint(run.output_dir, self.repo_id, private=private)

        def upload_copy() -> str:
            with staged:
                return upload(files, self.repo_id, message, hint, private)

        return upload_copy


def _warn_of_failure(call: Callable) -> None:
    try:
        call()
    except Exception as error:
        log.warning(f"training continues, but {error}")
