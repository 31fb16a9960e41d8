"""The clients of the Hub work with the server in hub_server.py as they do with the Hub."""

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session
from PIL import Image

WEIGHTS = bytes(range(256)) * 1200  # several chunks per upload
FILES = {"README.md": b"---\nlicense: mit\n---\n# Digits\n", "config.json": b"{}", "unet/model.safetensors": WEIGHTS}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.url, token="hf_secret")
    api.create_repo("model")
    return api


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


def pull(hub, tmp_path, **settings) -> dict[str, bytes]:
    settings |= {"token": "hf_secret", "endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    folder = Path(snapshot_download("me/model", **settings))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pushed_files_are_pulled_and_not_sent_twice(hub, api, folder, tmp_path):
    first = api.upload_folder(repo_id="me/model", folder_path=folder)
    assert list(hub.uploaded_bytes.values()) == [len(WEIGHTS)]
    there = hub.files("me/model")
    assert {name: there[name] for name in FILES} == FILES
    assert api.upload_folder(repo_id="me/model", folder_path=folder).oid == first.oid
    assert len(hub.repo("me/model").commits) == 2
    api.upload_file(repo_id="me/model", path_in_repo="copy.safetensors", path_or_fileobj=WEIGHTS)
    assert list(hub.uploads.values()) == [1]
    assert hub.files("me/model")["copy.safetensors"] == WEIGHTS
    part = HfFileSystem(endpoint=hub.url, token="hf_secret").cat_file("me/model/copy.safetensors", start=250, end=260)
    assert part == WEIGHTS[250:260]
    pulled = pull(hub, tmp_path)
    assert pulled == hub.files("me/model")
    hub.requests.clear()
    assert pull(hub, tmp_path, local_files_only=True) == pulled
    assert hub.requests == []


def test_a_private_repository_is_hidden_from_others(hub, api):
    api.create_repo("club/secret", private=True)
    reader, other = (HfApi(endpoint=hub.url, token=token) for token in ("hf_reader", "hf_other"))
    assert reader.model_info("club/secret").private
    reader.auth_check("club/secret")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.auth_check("club/secret", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.upload_file(repo_id="club/secret", path_in_repo="a", path_or_fileobj=b"a")
    for stranger in (other, HfApi(endpoint=hub.url, token=False)):
        assert not stranger.repo_exists("club/secret")
        with pytest.raises(RepositoryNotFoundError):
            stranger.list_repo_files("club/secret")
    scope = {"entity": {"type": "org", "name": "club"}, "permissions": ["repo.write"]}
    hub.users["hf_fine"] = {"name": "you", "role": "fineGrained", "orgs": [], "fineGrained": {"scoped": [scope]}}
    fine = HfApi(endpoint=hub.url, token="hf_fine")
    fine.auth_check("club/secret", write=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        fine.auth_check("me/model", write=True)
    with pytest.raises(HfHubHTTPError, match="under the namespace"):
        other.create_repo("me/theirs")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("model")


def test_branches_tags_and_pull_requests(hub, api, folder, tmp_path):
    first = api.repo_info("me/model").sha
    api.create_branch("me/model", branch="a/b")
    api.upload_folder(repo_id="me/model", folder_path=folder, revision="a/b")
    api.create_tag("me/model", tag="v1", revision="a/b")
    other = HfApi(endpoint=hub.url, token="hf_other")
    pull_request = other.upload_folder(repo_id="me/model", folder_path=folder, create_pr=True)
    assert pull_request.pr_revision == "refs/pr/1"
    assert api.repo_info("me/model").sha == first
    assert set(FILES) <= set(pull(hub, tmp_path, revision="v1"))
    assert pull(hub, tmp_path, revision="refs/pr/1") == pull(hub, tmp_path, revision="a/b")
    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "a/b"]
    assert refs.pull_requests[0].target_commit == pull_request.oid
    hub.page_size = 1
    assert {entry.path for entry in api.list_repo_tree("me/model", "unet", revision="v1")} == {"unet/model.safetensors"}
    assert set(api.list_repo_files("me/model", revision="a/b")) == {".gitattributes", *FILES}
    assert [commit.commit_id for commit in api.list_repo_commits("me/model", revision="v1")][1:] == [first]
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("me/model", revision="v2")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(repo_id="me/model", path_in_repo="a", path_or_fileobj=b"a", revision="a/b", parent_commit=first)
    proposed = api.upload_file(
        repo_id="me/model", path_in_repo="a", path_or_fileobj=b"a", parent_commit=first, create_pr=True
    )
    api.upload_file(repo_id="me/model", path_in_repo="b", path_or_fileobj=b"b")
    later = api.upload_file(
        repo_id="me/model", path_in_repo="c", path_or_fileobj=b"c", parent_commit=first, create_pr=True
    )
    assert [set(hub.files("me/model", pr.pr_revision)) for pr in (proposed, later)] == [
        {".gitattributes", "a"},
        {".gitattributes", "c"},
    ]
    api.delete_folder(repo_id="me/model", path_in_repo="unet", revision="a/b")
    assert "unet/model.safetensors" not in hub.files("me/model", "a/b")


def test_broken_transfers_are_retried_or_raise(hub, api, folder, tmp_path):
    hub.fail("^PUT /lfs/", after_bytes=1000)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert (*hub.uploaded_bytes.values(), *hub.uploads.values()) == (1000 + len(WEIGHTS), 1)
    hub.fail("^GET .*safetensors", after_bytes=300_000)
    assert pull(hub, tmp_path)["unet/model.safetensors"] == WEIGHTS
    hub.fail("/commit/", status=403)
    with pytest.raises(HfHubHTTPError, match="a fault on demand"):
        api.upload_file(repo_id="me/model", path_in_repo="a", path_or_fileobj=b"a")
    hub.quota = hub.repo("me/model").stored() + 10
    with pytest.raises(HfHubHTTPError, match="storage limit reached"):
        api.upload_file(repo_id="me/model", path_in_repo="b.png", path_or_fileobj=b"b" * 11)
    api.upload_file(repo_id="me/model", path_in_repo="c.png", path_or_fileobj=b"c" * 10)
    hub.quota, addition = None, CommitOperationAdd("d.png", b"d")
    addition.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError) as wrong:
        api.create_commit("me/model", [addition], commit_message="of another name")
    assert "The content sent is not 0000" in str(wrong.value.__cause__)
    assert not {"a", "b.png", "d.png"} & set(hub.files("me/model"))
    hub.fail("/commit/", after_bytes=1_000_000)
    with pytest.raises(Exception, match="disconnected") as cut:  # of httpx or httpx2, by the version of the library
        api.upload_file(repo_id="me/model", path_in_repo="e", path_or_fileobj=b"e")
    assert type(cut.value).__name__ == "RemoteProtocolError"
    assert hub.files("me/model")["e"] == b"e"


def test_held_requests_are_answered_after_release(hub, api):
    hub.hold("/refs")
    assert api.repo_exists("me/model")
    asked = threading.Thread(target=api.list_repo_refs, args=["me/model"])
    asked.start()
    asked.join(0.3)
    assert asked.is_alive()
    hub.release()
    asked.join(10)
    assert not asked.is_alive()


def test_planted_files_are_served_unchecked(hub, tmp_path):
    hub.plant("you/model", {"../a": b"a", "b.bin": b"b" * 9}, headers={"b.bin": {"Content-Length": "5"}})
    assert sorted(HfApi(endpoint=hub.url).list_repo_files("you/model")) == ["../a", "b.bin"]
    chunks = iter([b'{"content": ', b'"no metadata"}'])
    assert len(get_session().post(f"{hub.url}/api/validate-yaml", content=chunks).json()["warnings"]) == 1
    with pytest.raises(OSError, match="should be of size 9 but has size 5"):
        hf_hub_download("you/model", "b.bin", endpoint=hub.url, cache_dir=tmp_path / "cache")


LOAD = """
from datasets import Dataset, Image, load_dataset
from PIL import Image as Pictures

pictures = [Pictures.new("L", (8, 8), 40 * n) for n in range(5)]
columns = {"image": pictures, "label": list(range(5))}
Dataset.from_dict(columns).cast_column("image", Image()).push_to_hub("me/data", private=True)
for streaming in (False, True):
    rows = list(load_dataset("me/data", split="train", streaming=streaming))
    assert [(row["label"], row["image"].getpixel((3, 3))) for row in rows] == [(n, 40 * n) for n in range(5)], rows
    rows = list(load_dataset("you/folder", split="train", streaming=streaming))
    assert [(row["label"], row["image"].getpixel((3, 3))) for row in rows] == [(0, 1), (1, 2)], rows
"""


def test_datasets_are_pushed_loaded_and_streamed(hub, tmp_path):
    pictures = {}
    for name, value in {"train/a/0.png": 1, "train/b/0.png": 2}.items():
        Image.new("L", (8, 8), value).save(file := io.BytesIO(), "png")
        pictures[name] = file.getvalue()
    hub.plant("you/folder", pictures, repo_type="dataset")
    env = hub.env(tmp_path / "home", token="hf_secret")
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.repo("me/data", "dataset").private
    assert "data/train-00000-of-00001.parquet" in hub.files("me/data", repo_type="dataset")
