"""Sharing a trained pipeline on the Hugging Face Hub."""

import hashlib
import json
import logging
import re
import shlex
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, validate_repo_id

from ddpm_hf.hub.cards import (
    CARD,
    EVALUATION,
    FACTS,
    MARK,
    PICTURES,
    evaluation_of,
    is_generated,
    model_card,
    read_facts,
)
from ddpm_hf.hub.self_contained import SHIPPED, code_of
from ddpm_hf.pipelines.loading import INDEX, check_inside, is_hub_id, root_of
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, load_pipeline

# The files of a model's repository. Left out are checkpoints, and pictures that show images of the data, which the user
# may not be allowed to publish: data.png, forward.png, neighbours.png, and the report of an evaluation.
CONFIG = "train_config.json"
MODEL = [INDEX, "unet/config.json", "unet/*.safetensors", "unet/*.safetensors.index*.json", "scheduler/*_config.json"]
UPLOADED = [*MODEL, CARD, FACTS, CONFIG, EVALUATION, "log.csv", *PICTURES]
# The file of a repository in which a push lists what it wrote, so that a later one deletes nothing else.
MANIFEST = "pushed.json"
ABOUT = (
    "What ddpm_hf last pushed here, each file with its checksums by the rules of git and of Git LFS. Of files that a "
    "later push does not bring any more, it deletes those that are listed here and are still as listed."
)
CONFLICT = 412  # the answer to a commit whose parent is no longer the head of the branch
RETRIED = (408, CONFLICT, 425, 429, 500, 502, 503, 504)
WAITS = (1, 5, 20)  # seconds before each retry
Files = dict[str, Path | bytes | ModelCard]  # by names in the repository: a file here, a content, a new card
Checksums = dict[str, dict[str, str]]  # by file: those by the rules of git and of Git LFS
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
    """Upload a pipeline folder in one commit, check that it has arrived, and return the commit's address.

    The repository is created if it does not exist. The files that `UPLOADED` names are sent, with a new model card
    unless somebody has edited it, here or on the Hub. Files that an earlier push wrote and the folder no longer has are
    deleted there, unless somebody has changed them since; no other file is deleted.

    Args:
        repo_id: user/name, or the name alone.
        private: make the repository private.
        self_contained: add the code, so that diffusers can load the pipeline without this package.
        revision: the branch, created if need be; default: main.
        create_pr: open a pull request, to a repository of anybody's.
        license: of the model, for the card: an identifier of the Hub's, such as "apache-2.0"; default: the one that the
            card on the Hub has.

    Raises:
        ValueError: the folder can't be uploaded, nobody is logged in or may not write there, or the upload failed; then
            the message has the command that tries again. The folder is not changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} does not exist; it must be a pipeline folder")
    pipeline = load_pipeline(str(folder), "folder")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"license={license!r} must be an identifier of the Hub's, such as apache-2.0")
    if license is not None and not is_generated(folder / CARD):
        raise ValueError(f"license={license!r}: {folder / CARD} has been edited and is uploaded as it is; say it there")
    repo_id = check_right_to_push(repo_id, private, create_pr)
    files = files_of(folder, pipeline, repo_id, license, self_contained)
    options = {"private": private, "self_contained": self_contained, "revision": revision, "create_pr": create_pr}
    again = push_command(folder, repo_id, **options, license=license)
    return upload(files, repo_id, "Upload a DDPM", again, private, revision, create_pr)


def push_command(folder: Path, repo_id: str, **options: bool | str | None) -> str:
    """The command line of a push with these options, those that are None or False left out."""
    words = ["ddpm-hf", "push", str(folder), repo_id]
    for name, value in options.items():
        words += [f"--{name}"] if value else []
        words += [value] if isinstance(value, str) else []
    return shlex.join(words)


def check_right_to_push(repo_id: str, private: bool = False, create_pr: bool = False, repo_type: str = "model") -> str:
    """The full name, user/name, of a repository that the logged-in user may write to (or open a pull request to).

    Raises:
        ValueError: an invalid name, no login, no right to write, or a public repository that is to be `private`.
    """
    validate_repo_id(repo_id)  # its error is a ValueError
    api = HfApi()
    try:
        me = api.whoami()
    except Exception as error:  # no token, a wrong one, no network: each has an error of its own
        raise ValueError(f"uploading needs a login (`hf auth login`): {error}") from error
    repo_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
    try:
        there = _info(repo_id, repo_type)
    except Exception as error:
        raise ValueError(f"{repo_id!r} can't be looked up on the Hub: {error}") from error
    if create_pr:
        if there is None:
            raise ValueError(f"{repo_id!r} is not on the Hub, or {me['name']} may not see it: create_pr needs it there")
        return repo_id
    owner, token = repo_id.split("/")[0], me.get("auth", {}).get("accessToken", {})
    roles = {me["name"]: "admin", **{org["name"]: org.get("roleInOrg", "write") for org in me.get("orgs", [])}}
    if roles.get(owner, "read") == "read":
        writable = ", ".join(name for name, role in roles.items() if role != "read")
        raise ValueError(f"{repo_id!r}: {me['name']} may not write to {owner}, but to {writable}")
    scopes = (token.get("fineGrained") or {}).get("scoped", [])
    scopes = [each for each in scopes if each.get("entity", {}).get("name") in (owner, repo_id)]
    fine = any("repo.write" in each.get("permissions", []) for each in scopes)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not fine):
        raise ValueError(f"{repo_id!r}: the token of this login may only read; log in with one that may write")
    if there is None:  # it will be created
        return repo_id
    try:
        api.auth_check(repo_id, repo_type=repo_type, write=True)
    except Exception as error:
        raise ValueError(f"{repo_id!r}: {me['name']} may not write to it: {error}") from error
    if private and not there.private:
        raise ValueError(f"{repo_id!r} exists and is public: make it private on the Hub, or leave out --private")
    return repo_id


def files_of(
    folder: Path,
    pipeline: DDPMCustomPipeline,
    repo_id: str,
    license: str | None = None,
    self_contained: bool = False,
) -> Files:
    """All that is uploaded of a pipeline folder."""
    files = files_in(folder)
    if not evaluation_of(pipeline, folder):  # none, or one from before the last training
        files.pop(EVALUATION, None)
    files |= code_of(folder) if self_contained else {}
    files |= {name: _without_paths(name, content) for name, content in files.items()
              if name.endswith(".json") and ".safetensors.index" not in name}  # fmt: skip
    if is_generated(folder / CARD):
        files[CARD] = model_card(pipeline, read_facts(folder / FACTS), folder, repo_id, license, self_contained)
        return files
    try:
        files[CARD].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{files[CARD]} must be UTF-8: {error}") from error
    return files


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a pipeline folder that a push uploads, by their names in the repository."""
    found = {path.relative_to(folder).as_posix(): path for pattern in UPLOADED for path in sorted(folder.glob(pattern))}
    for path in found.values():
        check_inside(path, root_of(folder))  # a link may lead to what is private
    return found


def _without_paths(name: str, content: Path | bytes) -> bytes:
    """A JSON file in which a path on this machine, of data or weights, is cut to its last part."""
    settings = json.loads(content.read_bytes() if isinstance(content, Path) else content)
    if not isinstance(settings, dict):
        raise ValueError(f"{content} must hold an object, not {type(settings).__name__}")
    settings.pop("_name_or_path", None)
    for key, value in settings.items() if name == CONFIG else ():
        may_be_id = key in ("dataset_name", "pretrained_model_name_or_path", "hub_model_id")
        if isinstance(value, str) and re.search(r"[/\\]", value) and not (may_be_id and is_hub_id(value)):
            settings[key] = PureWindowsPath(value).name  # knows both kinds of slashes
    return (json.dumps(settings, indent=2) + "\n").encode()


# ---------------------------------------------------------------- the upload


@dataclass(frozen=True)
class _Revision:
    """A revision of a repository as the Hub has it.

    Args:
        commit: its full name.
        files: by their names.
        card: README.md, or None if there is none.
        listed: checksums of what an earlier push wrote, by file; None if there is no valid manifest.
    """

    commit: str
    files: dict[str, RepoFile]
    card: str | None
    listed: Checksums | None

    def has(self, name: str, checksums: Checksums | None) -> bool:
        """Whether a file is there with the content that `checksums` has for it."""
        return name in self.files and _checksum(self.files[name]) in (checksums or {}).get(name, {}).values()


def upload(
    files: Files,
    repo_id: str,
    message: str,
    again: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Commit files to a repository, check that they have arrived, and return the commit's address.

    Args:
        files: a model card without a licence takes the one that the card on the Hub has.
        again: the command that tries again.

    Raises:
        ValueError: the upload failed; the message has `again`.
    """
    repo, branch = {"repo_id": repo_id, "repo_type": repo_type}, {"revision": revision, "create_pr": create_pr}
    try:
        _retry(lambda: _prepare(private, revision, **repo))
        if create_pr:  # not retried: a second request would open a second pull request
            made, written, notes = _commit(files, message, repo, branch)
        else:  # each retry looks first: only the answer may have been lost, or somebody else has committed
            made, written, notes = _retry(lambda: _commit(files, message, repo, branch))
        _retry(lambda: _check_there(written, revision=made.oid, **repo))
    except Exception as error:  # the Hub, its client, the network and the disk all raise their own
        reasons, cause = ["somebody else keeps changing it at the same time"] * (_status(error) == CONFLICT), error
        while cause is not None:
            reasons, cause = [*reasons, str(cause)], cause.__cause__
        reason = " ".join(": ".join(filter(None, reasons)).split())
        raise ValueError(f"its upload to {repo_id} failed ({reason}); `{again}` tries again") from error
    for note in notes:
        log.warning(note)
    return made.pr_url or made.commit_url


def _prepare(private: bool, revision: str | None, repo_id: str, repo_type: str) -> None:
    """Create the repository and the branch if they do not exist."""
    api = HfApi()
    if _info(repo_id, repo_type) is None:
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk)
    if revision is None or revision.startswith("refs/pr/"):
        return
    branches = [branch.name for branch in api.list_repo_refs(repo_id, repo_type=repo_type).branches]
    if revision not in branches and _info(repo_id, repo_type, revision):
        raise ValueError(f"revision={revision!r} is a tag or a commit; it must be a branch")
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)


def _commit(files: Files, message: str, repo: dict, branch: dict) -> tuple[CommitInfo, Checksums, list[str]]:
    """Make the commit; return it, the checksums of what it wrote, and warnings about what it left or replaced."""
    api, there = HfApi(), _look(revision=branch["revision"], **repo)
    edited, listed = _edited(files, there, repo["repo_type"]), there.listed or {}
    adds = [CommitOperationAdd(name, _content(each, there.card)) for name, each in files.items() if name not in edited]
    written = {add.path_in_repo: _checksums(add) for add in adds}
    manifest = {"about": ABOUT, "files": written | {name: listed[name] for name in edited if name in listed}}
    adds.append(CommitOperationAdd(MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()))
    written[MANIFEST] = _checksums(adds[-1])
    others = there.files.keys() - files.keys() - {MANIFEST}
    stale = sorted(name for name in others if there.has(name, listed))
    notes = _notes(others.difference(stale), edited, written, there, repo["repo_type"])
    for add in adds:  # one by one: the client sends several from threads, for which a stopped run would wait
        api.preupload_lfs_files(**repo, **branch, additions=[add], free_memory=False)
    operations = [*adds, *map(CommitOperationDelete, stale)]
    made = api.create_commit(
        **repo, **branch, operations=operations, commit_message=message, parent_commit=there.commit
    )
    if branch["create_pr"] and made.pr_url is None:
        raise ValueError("nothing in it differs from what is there, so there is nothing to propose")
    return made, written, notes


def _look(revision: str | None, **repo) -> _Revision:
    api = HfApi()
    at = {**repo, "revision": api.repo_info(**repo, revision=revision).sha}
    files = {entry.path: entry for entry in api.list_repo_tree(**at, recursive=True) if isinstance(entry, RepoFile)}

    def read(name: str) -> bytes | None:
        if name not in files:
            return None
        # Not from the client's cache, which would answer even when the Hub does not
        answer = http_backoff("GET", hf_hub_url(filename=name, **at), headers=build_hf_headers())
        hf_raise_for_status(answer)
        return answer.content

    card, manifest = read(CARD), read(MANIFEST)
    return _Revision(at["revision"], files, card and card.decode(errors="replace"), _listed(manifest))


def _listed(manifest: bytes | None) -> Checksums | None:
    try:
        return {name: dict(sums) for name, sums in json.loads(manifest or "")["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # there is none, or somebody edited it
        return None


def _edited(files: Files, there: _Revision, repo_type: str) -> set[str]:
    """Names of files that stay as somebody has edited them on the Hub: of a model the card, of a Space any file."""
    if repo_type == "model":
        new_card = isinstance(files[CARD], ModelCard)  # else it is one that somebody has edited in the folder
        return {CARD} if new_card and there.card is not None and MARK not in there.card else set()
    listed = files.keys() & there.files.keys() & (there.listed or {}).keys()
    return {name for name in listed if not there.has(name, there.listed)}


def _content(content: Path | bytes | ModelCard, card_there: str | None) -> str | bytes:
    if isinstance(content, ModelCard):
        if content.data.license is None and card_there is not None:
            content.data.license = ModelCard(card_there, ignore_metadata_errors=True).data.license
        return str(content).encode()
    return content if isinstance(content, bytes) else str(content)


def _notes(others: set[str], edited: set[str], written: Checksums, there: _Revision, repo_type: str) -> list[str]:
    """Warnings about files that no push is known to have written as they are there.

    Args:
        others: files that stay and are not among the pushed ones.
    """
    if there.listed is None:  # warn of those that look like a push's
        patterns = UPLOADED + SHIPPED if repo_type == "model" else []
        left = {name for name in others for pattern in patterns
                if fnmatch(name, pattern) and name.count("/") == pattern.count("/")}  # fmt: skip
    else:
        left = others & there.listed.keys()
    replaced = {name for name in written.keys() & there.files.keys() - {MANIFEST}
                if not there.has(name, written) and not there.has(name, there.listed)}  # fmt: skip
    unknown = "no push is known to have written"
    notes = {
        f"stay on the Hub, although the folder does not have them: {unknown} them as they are": left,
        f"were replaced on the Hub; {unknown} what was there, which its history keeps": replaced,
        "stay as somebody has edited them on the Hub": edited,
    }
    return [f"{', '.join(sorted(names))} {note}" for note, names in notes.items() if names]


def _check_there(written: Checksums, **where) -> None:
    there = {info.path: info for info in HfApi().get_paths_info(paths=list(written), **where)}
    for name, sums in written.items():
        if name not in there or _checksum(there[name]) not in sums.values():
            raise ValueError(f"{name} is not in the repository as it was sent")


def _checksums(add: CommitOperationAdd) -> dict[str, str]:
    """By git's and by Git LFS's rule: the Hub decides which files it keeps how, and has one of the two."""
    git = hashlib.sha1(b"blob %d\0" % add.upload_info.size, usedforsecurity=False)
    with add.as_file() as file:
        while part := file.read(1 << 20):
            git.update(part)
    return {"git": git.hexdigest(), "sha256": add.upload_info.sha256.hex()}


def _checksum(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _info(repo_id: str, repo_type: str = "model", revision: str | None = None):
    """What the Hub says of a repository or revision; None if it says that there is none.

    Other answers, and none at all, stay errors: the client calls a repository "not found" also for a login that has
    ended (401) and for one that must be asked for (403).
    """
    try:
        return HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if error.response.status_code != 404:
            raise
        return None


def _retry(call):
    """Its result, tried again after an answer that may pass or a broken connection.

    The client itself retries uploads of weights, downloads and listings, but not repo_info, create_repo, create_branch,
    get_paths_info, list_repo_refs and create_commit. What has been sent is not sent again.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            # By name, as it is of the client's HTTP library, which differs between versions of the client
            broke = any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
            if wait is None or not (broke or _status(error) in RETRIED):
                raise
            time.sleep(wait)


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None
