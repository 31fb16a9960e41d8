"""Sharing a trained pipeline on the Hugging Face Hub."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path, PureWindowsPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.cards import (
    CARD,
    EVALUATION,
    FACTS,
    MARK,
    PICTURES,
    card_maker,
    evaluation_of,
    is_hub_id,
    is_ours,
    read_facts,
)
from ddpm_hf.files import Lock
from ddpm_hf.loading import INDEX, OURS, check_inside, root_of
from ddpm_hf.pipeline import DDPMCustomPipeline, load_pipeline

# What belongs into a model's repository. Checkpoints do not, and neither do the pictures that show images of the data,
# which may not be one's own to publish: data.png, forward.png, neighbours.png, and the report of an evaluation.
CONFIG = "train_config.json"
MODEL = [INDEX, "unet/config.json", "unet/*.safetensors", "unet/*.safetensors.index*.json", "scheduler/*_config.json"]
UPLOADED = [*MODEL, CARD, FACTS, CONFIG, EVALUATION, "log.csv", *PICTURES]
# The code of a repository that carries its own: pipeline.py and what it imports. Our modules as they are, but for the
# names that they have for one another: diffusers copies the code of all repositories into one folder.
MODULES = ("images", "loading", "scheduler", "solvers", "unet")
SHIPPED = ["pipeline.py", "ddpm_hf_*.py", "unet/ddpm_hf_*.py", "scheduler/ddpm_hf_*.py"]
# The file of a repository in which a push lists what it wrote, so that a later one deletes nothing else.
MANIFEST = "pushed.json"
ABOUT = (
    "What ddpm_hf last pushed here, each file with its checksums by the rules of git and of Git LFS. Of files that a "
    "later push does not bring any more, it deletes those that are listed here and are still as listed."
)
WAITS = (1, 5, 20)  # seconds before an upload that broke off is continued
CHANGED = 412  # the answer to a commit that builds on another revision than the branch has by now
PASSING = (408, CHANGED, 425, 429, 500, 502, 503, 504)  # answers that another time may be others
log = logging.getLogger(__name__)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    self_contained: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> str:
    """Upload a pipeline folder, in one commit, and give its address once it has been seen to be there.

    The repository is made if it is not there. Of the folder goes what `UPLOADED` names, with a model card made of
    run.json unless somebody has edited it, here or on the Hub. What an earlier push wrote there and the folder does
    not have any more is deleted, unless somebody has changed it since; of everything else nothing is deleted.

    Args:
        repo_id: user/name, or the name alone.
        private: make the repository private.
        self_contained: put in the code too, so that diffusers can load it without this package.
        revision: the branch, made if need be; default: main.
        create_pr: open a pull request, to a repository that anybody may own.
        license: of the model, for the card: an identifier of the Hub's, such as "apache-2.0"; default: the one that the
            card on the Hub has.

    Raises:
        ValueError: the folder can't be uploaded, nobody is logged in or may not write there, or the upload failed: then
            the message has the command that tries again. Nothing here is changed by it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is not there; it must be a pipeline folder")
    pipeline = load_pipeline(str(folder), "folder")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"license={license!r} must be an identifier of the Hub's, such as apache-2.0")
    if license is not None and not is_ours(folder / CARD):
        raise ValueError(f"license={license!r}: {folder / CARD} has been edited and is uploaded as it is; say it there")
    repo_id = check_right_to_push(repo_id, private, only_to_propose=create_pr)
    again = ["ddpm-hf", "push", str(folder), repo_id, *["--private"] * private, *["--self-contained"] * self_contained]
    again += ["--revision", revision] if revision else []
    again += ["--create-pr"] * create_pr + (["--license", license] if license else [])
    again = shlex.join(again)
    files = files_of(folder, pipeline, repo_id, self_contained)
    return _upload(
        lambda licensed: files(license or licensed), repo_id, "Upload a DDPM", again, private, revision, create_pr
    )


def push_space(repo_id: str, private: bool = False) -> str:
    """Make a Space of the model's name, which shows the page of `ddpm-hf demo`, and give its commit's address.

    Files of an earlier push that somebody has changed on the Hub stay as they are.
    """
    try:
        from ddpm_hf.demo import space_files
    except ImportError as error:
        raise ValueError(f"{error}: a Space needs more packages, `pip install ddpm-hf[demo]`") from error
    repo_id = check_right_to_push(repo_id)
    files = {name: text.encode() for name, text in space_files(repo_id).items()}
    return _upload(lambda _: files, repo_id, "Show a DDPM", "the same command", private, repo_type="space")


def check_right_to_push(repo_id: str, private: bool = False, only_to_propose: bool = False) -> str:
    """Full name, user/name, of a repository that the one who is logged in may write to (or propose a change to).

    Raises:
        ValueError: a name that can't be, no login, no right to write, or a public repository that is to be `private`.
    """
    validate_repo_id(repo_id)  # its error is a ValueError
    api = HfApi()
    try:
        me = api.whoami()
    except Exception as error:  # no token, a wrong one, no network: each has an error of its own
        raise ValueError(f"uploading needs a login (`hf auth login`): {error}") from error
    repo_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
    try:
        there = _or_none(lambda: api.repo_info(repo_id))
    except Exception as error:
        raise ValueError(f"{repo_id!r} can't be looked at on the Hub: {error}") from error
    if only_to_propose:
        if there is None:
            raise ValueError(f"{repo_id!r} is not on the Hub, or not to be seen by {me['name']}: nothing to propose to")
        return repo_id
    owner, token = repo_id.split("/")[0], me.get("auth", {}).get("accessToken", {})
    roles = {me["name"]: "admin", **{org["name"]: org.get("roleInOrg", "write") for org in me.get("orgs", [])}}
    if owner not in roles or roles[owner] == "read":
        writable = ", ".join(name for name, role in roles.items() if role != "read")
        raise ValueError(f"{repo_id!r}: {me['name']} may not write to {owner}; of names there are {writable}")
    scoped = [
        (part.get("entity", {}).get("name"), part.get("permissions", []))
        for part in (token.get("fineGrained") or {}).get("scoped", [])
    ]
    fine = any(name in (owner, repo_id) and "repo.write" in permissions for name, permissions in scoped)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not fine):
        raise ValueError(f"{repo_id!r}: the token of this login may only read; log in with one that may write")
    if there is None:  # it will be made
        return repo_id
    try:
        api.auth_check(repo_id, write=True)
    except Exception as error:
        raise ValueError(f"{repo_id!r}: {me['name']} may not write to it: {error}") from error
    if private and not there.private:
        raise ValueError(
            f"{repo_id!r} is there and public: make it private on the Hub, or do not ask for a private one"
        )
    return repo_id


class PushInBackground:
    """Uploads a `Run` while its training goes on: `check` before, the object itself after each save, `finish` behind.

    After a save the training waits for the disk only: whatever asks the Hub does so in a thread of its own, which
    reads nothing that the training goes on to change. A save that comes while an upload is under way is left to the
    next. An upload that fails is told and does nothing to the run; only when the last one fails, the training being
    done, is that a ValueError.
    """

    def __init__(self):
        self.repo_id, self.thread = None, None

    def check(self, run) -> None:
        """Before training: a ValueError if an upload would fail for want of a login, a right or a right name."""
        name = run.config.hub_model_id or run.output_dir.resolve().name
        try:
            self.repo_id = check_right_to_push(name, run.config.hub_private_repo)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={name!r}: {error}") from error

    def __call__(self, run) -> None:
        if run.finished or (self.thread is not None and self.thread.is_alive()):
            return
        try:
            upload = self._staged(run)
        except Exception as error:  # a full disk, a card that can't be made
            return log.warning(f"training goes on, but update {run.step} can't be uploaded: {error}")

        def upload_or_tell():
            try:
                upload()
            except Exception as error:
                log.warning(f"training goes on, but {error}")

        self.thread = threading.Thread(target=upload_or_tell, daemon=True)  # a stopped run does not wait for it
        self.thread.start()

    def finish(self, run) -> None:
        """After training, if it is done: upload what it has come to, and print the commit's address."""
        if not run.finished:
            return
        if self.thread is not None:
            self.thread.join()
        try:
            with Lock(run.output_dir, "train"):  # another training would clear away what is staged
                print(self._staged(run)(), flush=True)
        except ValueError as error:
            raise ValueError(f"the model is trained and saved in {run.output_dir}, but {error}") from error

    def _staged(self, run) -> Callable[[], str]:
        """What uploads the run as it is now, whatever becomes of it and of its folder. Here nothing asks the Hub."""
        from ddpm_hf.checkpoints import SAVING  # of packages that only training needs

        # What is uploaded must not change meanwhile: weights are replaced when they are saved, so that a link to the
        # old ones serves; the rest is copied.
        staged = tempfile.TemporaryDirectory(dir=run.output_dir, prefix=SAVING, ignore_cleanup_errors=True)
        folder = Path(staged.name) / run.output_dir.resolve().name
        for path, source in _belonging(run.output_dir).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, folder / path)
        message, private = f"Train for {run.step} updates", run.config.hub_private_repo
        again = shlex.join(["ddpm-hf", "push", str(run.output_dir), self.repo_id, *["--private"] * private])
        files = files_of(folder, run.pipeline, self.repo_id)

        def upload() -> str:
            with staged:
                return _upload(files, self.repo_id, message, again, private)

        return upload


def files_of(
    folder: Path, pipeline: DDPMCustomPipeline, repo_id: str, self_contained: bool = False
) -> Callable[[str | None], dict[str, Path | bytes]]:
    """What gives, for a licence of the model, all that goes into the repository.

    That is, by its name there, a file of `folder` or a content. `pipeline` is not looked at any more afterwards.
    """
    files = dict(_belonging(folder))
    if not evaluation_of(pipeline, folder):  # none, or one from before the last training
        files.pop(EVALUATION, None)
    card = None
    if is_ours(folder / CARD):
        card = card_maker(pipeline, read_facts(folder), folder, repo_id, self_contained)
    else:
        try:
            files[CARD].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{files[CARD]} must be UTF-8: {error}") from error
    code = code_of(folder) if self_contained else {}
    jsons = [name for name in files if name.endswith(".json") and ".safetensors.index" not in name]
    files |= {name: _without_paths(name, code.get(name, files[name])) for name in jsons}
    files |= {name: content for name, content in code.items() if name not in jsons}
    return lambda license: files | ({CARD: str(card(license)).encode()} if card else {})


def _belonging(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for pattern in UPLOADED for path in sorted(folder.glob(pattern))}
    for path in found.values():
        check_inside(path, root_of(folder))  # what a link leads to may be nobody else's business
    return found


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _without_paths(name: str, content: Path | bytes) -> bytes:
    """Where on a disk data or weights were is nobody's business: of a path, its last part."""
    source = content if isinstance(content, Path) else name
    settings = json.loads(content.read_bytes() if isinstance(content, Path) else content)
    if not isinstance(settings, dict):
        raise ValueError(f"{source} must hold an object, not {type(settings).__name__}")

    def kept(key, value) -> bool:
        return key in ("dataset_name", "pretrained_model_name_or_path", "hub_model_id") and is_hub_id(value)

    settings.pop("_name_or_path", None)
    if name == CONFIG:
        for key, value in settings.items():
            if isinstance(value, str) and re.search(r"[/\\]", value) and not kept(key, value):
                settings[key] = PureWindowsPath(value).name  # knows both kinds of slashes
    return (json.dumps(settings, indent=2) + "\n").encode()


def code_of(folder: Path) -> dict[str, bytes]:
    """The files with which diffusers loads this folder's pipeline where ddpm_hf is not installed.

    model_index.json, with each component's class in a module that lies in the component's folder; these modules; and
    pipeline.py with those that it imports. Modules bear a checksum in their names, so that those of two repositories
    don't meet.
    """
    package = resources.files("ddpm_hf")
    sources = {name: package.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in ("pipeline", *MODULES)}
    checksum = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:12]

    def shipped(name: str) -> bytes:
        relative = re.sub(
            r"^from ddpm_hf\.(\w+) import ", rf"from .ddpm_hf_{checksum}_\1 import ", sources[name], flags=re.M
        )
        return relative.encode()

    files = {f"ddpm_hf_{checksum}_{name}.py": shipped(name) for name in MODULES} | {"pipeline.py": shipped("pipeline")}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for component in ("unet", "scheduler"):
        if index[component][1] in OURS:
            module = f"ddpm_hf_{checksum}_{component}"
            index[component][0] = module
            files[f"{component}/{module}.py"] = shipped(component)
    index["_class_name"] = ["pipeline", DDPMCustomPipeline.__name__]
    return files | {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        try:
            return os.link(source, target)
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)


# ---------------------------------------------------------------- the upload


@dataclass(frozen=True)
class _There:
    """A revision of a repository as the Hub has it.

    Args:
        commit: its full name.
        files: by their names.
        card: README.md, or None if there is none.
        listed: checksums of what an earlier push wrote, by file; None if there was none that lists them.
    """

    commit: str
    files: dict[str, RepoFile]
    card: str | None
    listed: dict[str, dict[str, str]] | None

    def has(self, name: str, checksums: dict[str, dict[str, str]] | None) -> bool:
        """Whether a file is there with the content that `checksums` has for it."""
        return name in self.files and _checksum(self.files[name]) in (checksums or {}).get(name, {}).values()


def _upload(
    files_for: Callable[[str | None], dict[str, Path | bytes]],
    repo_id: str,
    message: str,
    again: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Address of the commit, which is there.

    Args:
        files_for: gives the files for the licence that the card on the Hub has.
        again: the command to try again with.

    Raises:
        ValueError: it failed; the message has `again`.
    """
    api, repo = HfApi(), {"repo_id": repo_id, "repo_type": repo_type}

    def commit(there: _There) -> tuple[CommitInfo, dict, list[str]]:
        ours = there.card is not None and MARK in there.card
        files = files_for(ModelCard(there.card, ignore_metadata_errors=True).data.license if ours else None)
        theirs = _theirs(files, there, repo_type)
        adds = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
            if name not in theirs
        ]
        written = {add.path_in_repo: _checksums(add) for add in adds}
        listed = there.listed or {}
        manifest = {"about": ABOUT, "files": written | {name: listed[name] for name in theirs if name in listed}}
        adds.append(CommitOperationAdd(MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()))
        written[MANIFEST] = _checksums(adds[-1])
        others = there.files.keys() - files.keys() - {MANIFEST}
        stale = sorted(name for name in others if there.has(name, listed))
        notes = _notes(others.difference(stale), theirs, written, there, repo_type)
        for add in adds:  # each alone: of several the client makes threads, for which a stopped run would wait
            api.preupload_lfs_files(**repo, additions=[add], revision=revision, create_pr=create_pr, free_memory=False)
        operations = [*adds, *map(CommitOperationDelete, stale)]
        how = {"commit_message": message, "revision": revision, "create_pr": create_pr, "parent_commit": there.commit}
        try:
            return api.create_commit(**repo, operations=operations, **how), written, notes
        except HfHubHTTPError as error:
            if error.response.status_code != CHANGED:
                raise
            raise ValueError("somebody else keeps changing it at the same time") from error

    try:
        _with_patience(lambda: _make_repository(api, private, revision=revision, **repo))
        if create_pr:  # tried once: of pull requests there would be two
            made, written, notes = commit(_with_patience(lambda: _look(api, revision=revision, **repo)))
            if made.pr_url is None:
                raise ValueError("nothing in it differs from what is there, so there is nothing to propose")
        else:  # looking anew at each try: only the answer may have been lost, or somebody else was faster
            made, written, notes = _with_patience(lambda: commit(_look(api, revision=revision, **repo)))
        _with_patience(lambda: _check_there(api, written, revision=made.oid, **repo))
    except Exception as error:  # the Hub, its client, the network and the disk all raise their own
        raise _failure(repo_id, again, error) from error
    for note in notes:
        log.warning(note)
    return made.pr_url or made.commit_url


def _look(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> _There:
    commit = api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha
    where = {"repo_id": repo_id, "repo_type": repo_type, "revision": commit}
    entries = api.list_repo_tree(**where, recursive=True)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def read(name: str) -> bytes | None:
        if name not in files:
            return None
        with tempfile.TemporaryDirectory() as cache:  # not the usual one, which answers when the Hub does not
            return Path(api.hf_hub_download(filename=name, cache_dir=cache, **where)).read_bytes()

    card, manifest = read(CARD), read(MANIFEST)
    return _There(commit, files, card and card.decode(errors="replace"), _listed(manifest))


def _listed(manifest: bytes | None) -> dict[str, dict[str, str]] | None:
    try:
        listed = json.loads(manifest or "")["files"]
    except (ValueError, KeyError, TypeError, RecursionError):  # also one that somebody has edited: then nobody knows
        return None
    return listed if isinstance(listed, dict) and all(isinstance(sums, dict) for sums in listed.values()) else None


def _theirs(files: dict[str, Path | bytes], there: _There, repo_type: str) -> set[str]:
    """What somebody has made theirs: of a model the card, of a Space whatever was changed since it was pushed."""
    if repo_type == "model":
        made_here = isinstance(files[CARD], bytes)  # else it is a file that somebody has edited
        return {CARD} if made_here and there.card is not None and MARK not in there.card else set()
    known = files.keys() & there.files.keys() & (there.listed or {}).keys()
    return {name for name in known if not there.has(name, there.listed)}


def _notes(others: set[str], theirs: set[str], written: dict, there: _There, repo_type: str) -> list[str]:
    """What is to be told of files that no push is known to have written as they are there.

    Args:
        others: those that stay and are not among the pushed ones.
    """
    if there.listed is not None:
        left = others & there.listed.keys()
    else:
        left = {name for name in others if repo_type == "model" and _matches(name, UPLOADED + SHIPPED)}
    replaced = {name for name in written.keys() & there.files.keys() - {MANIFEST} if not there.has(name, written)}
    replaced = {name for name in replaced if not there.has(name, there.listed)}
    unknown = "no push is known to have written"
    told = {
        f"stay on the Hub, although the folder does not have them: {unknown} them as they are": left,
        f"were replaced on the Hub; {unknown} what was there, which its history keeps": replaced,
        "stay as somebody has edited them on the Hub": theirs,
    }
    return [f"{', '.join(sorted(names))} {what}" for what, names in told.items() if names]


def _checksums(add: CommitOperationAdd) -> dict[str, str]:
    """By git's and by Git LFS's rule: the Hub decides which files it keeps how, and has one of the two."""
    git = hashlib.sha1(b"blob %d\0" % add.upload_info.size, usedforsecurity=False)
    with add.as_file() as file:
        while part := file.read(1 << 20):
            git.update(part)
    return {"git": git.hexdigest(), "sha256": add.upload_info.sha256.hex()}


def _checksum(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _or_none(call):
    """Its result, or None if the Hub says that there is no such repository or revision.

    Other answers, and none at all, stay errors: the client calls a repository "not found" also for a login that has
    ended (401) and for one that must be asked for (403).
    """
    try:
        return call()
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if error.response.status_code != 404:
            raise
        return None


def _failure(repo_id: str, again: str, error: Exception) -> ValueError:
    reason = " ".join(": ".join(str(e) for e in _chain(error) if str(e)).split())
    return ValueError(f"its upload to {repo_id} failed ({reason}); `{again}` tries again")


def _make_repository(api: HfApi, private: bool, repo_id: str, repo_type: str, revision: str | None) -> None:
    if _or_none(lambda: api.repo_info(repo_id, repo_type=repo_type)) is None:
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk)  # if by now it is there
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError("the repository is there and public: make it private on the Hub")
    if revision is None or revision.startswith("refs/pr/"):
        return
    branches = [branch.name for branch in api.list_repo_refs(repo_id, repo_type=repo_type).branches]
    if revision not in branches and _or_none(lambda: api.repo_info(repo_id, revision=revision, repo_type=repo_type)):
        raise ValueError(f"revision={revision!r} is a tag or a commit; what changes is a branch")
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)


def _check_there(api: HfApi, written: dict[str, dict[str, str]], **where) -> None:
    there = {info.path: info for info in api.get_paths_info(paths=list(written), **where)}
    for name, sums in written.items():
        if name not in there or _checksum(there[name]) not in sums.values():
            raise ValueError(f"{name} is not in the repository as it was sent")


def _with_patience(call):
    """Its result, tried again if the connection broke. What has been sent is not sent again."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not any(_passes(e) for e in _chain(error)):
                raise
            time.sleep(wait)


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in PASSING
    # Of the client's own HTTP library, which the Hub's client has changed before.
    return isinstance(error, ConnectionError) or any(cls.__name__ == "TransportError" for cls in type(error).__mro__)


def _chain(error: BaseException) -> list[BaseException]:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes
