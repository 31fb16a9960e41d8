"""Pushing a trained pipeline to the Hugging Face Hub."""

import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.hub.cards import CARD, is_generated
from ddpm_hf.hub.contents import files_of
from ddpm_hf.hub.upload import repo_info, upload
from ddpm_hf.pipelines.loading import TRANSIENT, response_of, retried
from ddpm_hf.pipelines.pipeline import load_pipeline


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    self_contained: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
) -> str:
    """Upload a pipeline folder in one commit, verify that it has arrived, and return the address of the commit.

    The repository is created if it does not exist. A new model card is uploaded unless the card was edited, in the
    folder or on the Hub. Files that an earlier push wrote and that the folder no longer has are deleted from the
    repository, unless they were changed there. No other file is deleted.

    Args:
        repo_id: "user/name", or "name" for a repository of the logged-in user.
        private: make the repository private.
        self_contained: add the code, so that diffusers can load the pipeline without this package.
        revision: the branch, created if it does not exist; default: main.
        create_pr: open a pull request. This needs no right to write.
        license: the licence of the model: an identifier of the Hub, such as "apache-2.0"; default: the licence in the
            model card on the Hub, if there is one.

    Raises:
        ValueError: the folder is not a valid pipeline, the login has no right to write, or the upload failed. Then the
            message has the command that tries again. The folder is never changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} does not exist; it must be a pipeline folder")
    pipeline = load_pipeline(str(folder), "folder")
    if any((folder / "unet").glob("*.raw.*")):
        load_pipeline(str(folder), "folder", "raw")  # they are uploaded too
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"license={license!r} must be a licence identifier of the Hub, such as apache-2.0")
    if license is not None and not is_generated(folder / CARD):
        raise ValueError(f"license={license!r}: {folder / CARD} was edited and is uploaded unchanged; set it there")
    repo_id = check_right_to_push(repo_id, private, create_pr)
    files = files_of(folder, pipeline, repo_id, license, self_contained)
    options = {"private": private, "self_contained": self_contained, "revision": revision, "create_pr": create_pr}
    hint = retry_hint(folder, repo_id, **options, license=license)
    return upload(files, repo_id, "Upload a DDPM", hint, private, revision, create_pr)


def retry_hint(folder: Path, repo_id: str, **options: bool | str | None) -> str:
    """How to repeat a push with these options; options that are None or False are left out."""
    words = ["ddpm-hf", "push", str(folder), repo_id]
    for name, value in options.items():
        words += [f"--{name}"] if value else []
        words += [value] if isinstance(value, str) else []
    return f"run `{shlex.join(words)}` to try again"


def check_right_to_push(repo_id: str, private: bool = False, create_pr: bool = False, repo_type: str = "model") -> str:
    """Check that the logged-in user may write to a repository, or open a pull request, and return its full name.

    Raises:
        ValueError: the name is invalid, there is no login or no right to write, or the repository is public although
            `private` is set.
    """
    validate_repo_id(repo_id)  # raises a ValueError
    api = HfApi()
    try:
        account = retried(api.whoami)
    except Exception as error:  # a missing token, a wrong token and a broken network raise different exceptions
        response = response_of(error)
        is_busy = response is not None and response.status_code in TRANSIENT
        what = "the Hub could not look up the login" if is_busy else "uploading needs a login (run `hf auth login`)"
        raise ValueError(f"{what}: {error}") from error
    user = account["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    try:
        existing = retried(lambda: repo_info(repo_id, repo_type))
    except Exception as error:
        raise ValueError(f"the Hub could not look up {repo_id!r}: {error}") from error
    if create_pr:
        if existing is None:
            raise ValueError(f"create_pr: {repo_id!r} does not exist on the Hub, or {user} may not read it")
        return repo_id
    _check_account(account, repo_id)
    if existing is None:  # it will be created
        return repo_id
    try:
        retried(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))
    except Exception as error:
        raise ValueError(f"{user} may not write to {repo_id!r}: {error}") from error
    if private and not existing.private:
        raise ValueError(f"{repo_id!r} exists and is public: make it private on the Hub, or leave out --private")
    return repo_id


def _check_account(account: dict, repo_id: str) -> None:
    """Raise ValueError if the account or its token may not write to the namespace of a repository."""
    user, owner, token = account["name"], repo_id.split("/")[0], account.get("auth", {}).get("accessToken", {})
    roles = {user: "admin", **{org["name"]: org.get("roleInOrg", "write") for org in account.get("orgs", [])}}
    writable = [name for name, role in roles.items() if role != "read"]
    if owner not in writable:
        raise ValueError(f"{repo_id!r}: {user} may not write to {owner}, only to {', '.join(writable)}")
    scopes = (token.get("fineGrained") or {}).get("scoped", [])
    scopes = [scope for scope in scopes if scope.get("entity", {}).get("name") in (owner, repo_id)]
    granted = any("repo.write" in scope.get("permissions", []) for scope in scopes)
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not granted):
        raise ValueError(f"{repo_id!r}: the token of this login is read-only; log in with a token that may write")
