"""Committing files to a repository on the Hugging Face Hub, and verifying that they have arrived."""

import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from ddpm_hf.hub.cards import CARD, MARK
from ddpm_hf.hub.contents import UPLOADED, Files
from ddpm_hf.hub.self_contained import SHIPPED
from ddpm_hf.pipelines.loading import TRANSIENT, response_of, retried
from ddpm_hf.utils.arguments import parse_json

MANIFEST = "pushed.json"  # lists what a push wrote, so that a later push deletes nothing else
ABOUT = (
    "The files that ddpm_hf last pushed to this repository, with their Git and Git LFS checksums. A later push deletes "
    "a file that it no longer uploads only if the file is listed here and has not changed since."
)
CONFLICT = 412  # the status of a commit whose parent is no longer the head of the branch
Checksums = dict[str, dict[str, str]]  # by file: its checksums in Git and in Git LFS
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Revision:
    """A revision of a repository on the Hub."""

    commit: str
    files: dict[str, RepoFile]  # by name
    card: str | None  # the text of README.md, if it exists
    listed: Checksums | None  # in the manifest of the last push, if it exists and is valid

    def has(self, name: str, checksums: Checksums | None) -> bool:
        """Whether the content of a file is that in `checksums`."""
        return name in self.files and _checksum(self.files[name]) in (checksums or {}).get(name, {}).values()


def upload(
    files: Files,
    repo_id: str,
    message: str,
    hint: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Commit files to a repository, verify that they have arrived, and return the address of the commit.

    Args:
        files: if a new model card states no licence, it takes that of the card on the Hub.
        hint: how to try again, for the error message.

    Raises:
        ValueError: the upload failed.
    """
    repo, branch = {"repo_id": repo_id, "repo_type": repo_type}, {"revision": revision, "create_pr": create_pr}
    retry = functools.partial(retried, statuses=(*TRANSIENT, CONFLICT), broken=True)  # what has arrived stays
    try:
        retry(lambda: _create(private, revision, **repo))
        if create_pr:  # not retried: a second request would open a second pull request
            commit, written, warnings = _commit(files, message, repo, branch)
        else:  # each attempt reads the repository again, which may have changed
            commit, written, warnings = retry(lambda: _commit(files, message, repo, branch))
        retry(lambda: _check_arrived(written, revision=commit.oid, **repo))
    except Exception as error:  # the Hub, its client, the network and the disk raise different exceptions
        response = response_of(error)
        conflict = response is not None and response.status_code == CONFLICT
        reasons, cause = ["the repository keeps changing during the upload"] * conflict, error
        while cause is not None:
            reasons, cause = [*reasons, str(cause)], cause.__cause__
        reason = " ".join(": ".join(filter(None, reasons)).split())
        raise ValueError(f"the upload to {repo_id} failed ({reason}); {hint}") from error
    for warning in warnings:
        log.warning(warning)
    return commit.pr_url or commit.commit_url


def _create(private: bool, revision: str | None, repo_id: str, repo_type: str) -> None:
    """Create the repository and the branch if they do not exist."""
    api = HfApi()
    if repo_info(repo_id, repo_type) is None:
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk)
    if revision is None or revision.startswith("refs/pr/"):
        return
    branches = [branch.name for branch in api.list_repo_refs(repo_id, repo_type=repo_type).branches]
    if revision not in branches and repo_info(repo_id, repo_type, revision):
        raise ValueError(f"revision={revision!r} is a tag or a commit; it must be a branch")
    api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)


def _commit(files: Files, message: str, repo: dict, branch: dict) -> tuple[CommitInfo, Checksums, list[str]]:
    """Make the commit; return it, the checksums of the files that it wrote, and warnings."""
    api, remote = HfApi(), _read_revision(revision=branch["revision"], **repo)
    edited, listed = _edited_on_hub(files, remote, repo["repo_type"]), remote.listed or {}
    adds = [CommitOperationAdd(name, _content(files[name], remote.card)) for name in files if name not in edited]
    written = {add.path_in_repo: _checksums(add) for add in adds}
    manifest = {"about": ABOUT, "files": written | {name: listed[name] for name in edited if name in listed}}
    adds.append(CommitOperationAdd(MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()))
    written[MANIFEST] = _checksums(adds[-1])
    others = remote.files.keys() - files.keys() - {MANIFEST}
    stale = sorted(name for name in others if remote.has(name, listed))
    warnings = _warnings(others.difference(stale), edited, written, remote, repo["repo_type"])
    for add in adds:  # one by one, because the client sends several from threads that delay the exit of a stopped run
        api.preupload_lfs_files(**repo, **branch, additions=[add], free_memory=False)
    operations = [*adds, *map(CommitOperationDelete, stale)]
    commit = api.create_commit(
        **repo, **branch, operations=operations, commit_message=message, parent_commit=remote.commit
    )
    if branch["create_pr"] and commit.pr_url is None:
        raise ValueError("the repository already has these files, so a pull request would be empty")
    return commit, written, warnings


def _read_revision(revision: str | None, **repo) -> _Revision:
    api = HfApi()
    at = {**repo, "revision": api.repo_info(**repo, revision=revision).sha}
    files = {entry.path: entry for entry in api.list_repo_tree(**at, recursive=True) if isinstance(entry, RepoFile)}

    def read(name: str) -> bytes | None:
        if name not in files:
            return None
        # Not hf_hub_download, which returns a cached file if the Hub does not answer
        answer = http_backoff("GET", hf_hub_url(filename=name, **at), headers=build_hf_headers())
        hf_raise_for_status(answer)
        return answer.content

    card, manifest = read(CARD), read(MANIFEST)
    return _Revision(at["revision"], files, card and card.decode(errors="replace"), _parse_manifest(manifest))


def _parse_manifest(manifest: bytes | None) -> Checksums | None:
    try:
        return {name: dict(sums) for name, sums in parse_json(manifest or "")["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # missing or edited
        return None


def _edited_on_hub(files: Files, remote: _Revision, repo_type: str) -> set[str]:
    """Files that keep their content on the Hub because they were edited there: the model card, or a file of a Space."""
    if repo_type == "model":
        generated = isinstance(files[CARD], ModelCard)  # a card that was edited in the folder replaces any other
        return {CARD} if generated and remote.card is not None and MARK not in remote.card else set()
    listed = files.keys() & remote.files.keys() & (remote.listed or {}).keys()
    return {name for name in listed if not remote.has(name, remote.listed)}


def _content(content: Path | bytes | ModelCard, remote_card: str | None) -> str | bytes:
    if isinstance(content, ModelCard):
        if content.data.license is None and remote_card is not None:
            content.data.license = ModelCard(remote_card, ignore_metadata_errors=True).data.license
        return str(content).encode()
    return content if isinstance(content, bytes) else str(content)


def _warnings(others: set[str], edited: set[str], written: Checksums, remote: _Revision, repo_type: str) -> list[str]:
    """Warnings about files on the Hub that were not written by a push.

    Args:
        others: files that stay and that are not uploaded.
    """
    if remote.listed is None:  # without a manifest, any file with the name of an uploaded one may be from a push
        patterns = UPLOADED + SHIPPED if repo_type == "model" else []
        left = {name for name in others for pattern in patterns
                if fnmatch(name, pattern) and name.count("/") == pattern.count("/")}  # fmt: skip
    else:
        left = others & remote.listed.keys()
    replaced = {name for name in written.keys() & remote.files.keys() - {MANIFEST}
                if not remote.has(name, written) and not remote.has(name, remote.listed)}  # fmt: skip
    groups = {
        "kept these files, which are not in the folder, because no earlier push wrote their present content": left,
        "replaced these files, whose content no earlier push wrote; the history of the repository keeps them": replaced,
        "kept these files because they were edited on the Hub": edited,
    }
    return [f"the upload {what}: {', '.join(sorted(names))}" for what, names in groups.items() if names]


def _check_arrived(written: Checksums, **where) -> None:
    arrived = {info.path: info for info in HfApi().get_paths_info(paths=list(written), **where)}
    for name, sums in written.items():
        if name not in arrived or _checksum(arrived[name]) not in sums.values():
            raise ValueError(f"{name} is missing in the repository or differs from the uploaded file")


def _checksums(add: CommitOperationAdd) -> dict[str, str]:
    """Both checksums of a file: the Hub decides whether it stores the file in Git or in Git LFS."""
    git = hashlib.sha1(b"blob %d\0" % add.upload_info.size, usedforsecurity=False)
    with add.as_file() as file:
        while part := file.read(1 << 20):
            git.update(part)
    return {"git": git.hexdigest(), "sha256": add.upload_info.sha256.hex()}


def _checksum(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def repo_info(repo_id: str, repo_type: str = "model", revision: str | None = None):
    """The Hub's description of a repository or revision; None if it does not exist.

    Only status 404 means that it does not exist: the client raises RepositoryNotFoundError also for an expired login
    (401) and a gated repository (403).
    """
    try:
        return HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if error.response.status_code != 404:
            raise
        return None
