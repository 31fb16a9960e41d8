"""Pushing models to a local Hub server, with the real client of the Hub."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_UNET, calls, tiny_config, tiny_unet
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

import ddpm_hf
from ddpm_hf import DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler, training
from ddpm_hf.commands import train_callbacks as command
from ddpm_hf.commands.main import main
from ddpm_hf.commands.train_callbacks import write_facts_and_card
from ddpm_hf.data.dataset import ImageData
from ddpm_hf.hub import background, cards, space
from ddpm_hf.hub.cards import MARK
from ddpm_hf.hub.push import check_right_to_push, push
from ddpm_hf.hub.self_contained import code_of
from ddpm_hf.schedulers.solvers import plain_config
from ddpm_hf.training.facts import facts_of
from ddpm_hf.utils.checksums import weights_sha256

MODEL = {
    "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "log.csv", "run.json",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.raw.safetensors", "loss.png",
    "samples.png", "first_samples.png", "denoising.gif", "train_config.json", ".gitattributes", "pushed.json",
}  # fmt: skip
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.raw.safetensors")
TRAIN = ["train", "--max_train_steps", "3", "--unet", json.dumps(TINY_UNET), "--train_batch_size", "8",
         "--eval_batch_size", "16", "--ddpm_num_inference_steps", "2"]  # fmt: skip
PUSH = ["--push_to_hub", "--hub_private_repo", "--hub_model_id", "digits-model"]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main([*TRAIN, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(made_once, tmp_path, monkeypatch) -> Path:
    """The output folder of `ddpm-hf train` for three updates."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_once, "runs/digits")
    return Path("runs/digits")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr("ddpm_hf.pipelines.loading.WAITS", (0, 0))


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(2, generator=generator, num_inference_steps=3, output_type="pt").images


# ---------------------------------------------------------------- what is uploaded


def test_push_uploads_the_model_and_prints_the_commit_address_last(hub, run, capsys):
    (run / "checkpoint-3" / "README.md").write_text("not this one")
    (run / "unet" / "notes.txt").write_text("nor this")
    assert main(["push", str(run), "me/digits", "--license", "mit"]) == 0
    sha = hub.repo("me/digits").sha("main")
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/digits/commit/{sha}"
    there = hub.files("me/digits")
    assert set(there) == MODEL
    made = {"README.md", "train_config.json", ".gitattributes", "pushed.json"}
    assert all(there[name] == (run / name).read_bytes() for name in MODEL - made)
    card = there["README.md"].decode()
    assert 'from_pretrained("me/digits")' in card
    assert "license: mit" in card
    assert not any(b"hf_secret" in content for content in there.values())
    torch.testing.assert_close(
        sample(DDPMCustomPipeline.from_pretrained("me/digits")), sample(DDPMCustomPipeline.from_pretrained(run))
    )


@pytest.mark.parametrize(("name", "variant"), [(WEIGHTS[0], None), (WEIGHTS[1], "raw")])
def test_weights_that_are_not_finite_are_not_pushed(hub, run, name, variant):
    weights = load_file(run / name)
    weights["stem.bias"][0] = torch.nan
    save_file(weights, run / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="can't be loaded: .* weights are not finite: 1 of .* such as stem.bias"):
        push(run, "me/digits")
    assert not hub.repos


def test_a_second_push_deletes_files_that_the_folder_no_longer_has(hub, run):
    push(run, "me/digits", self_contained=True)
    assert any(name.endswith("_unet.py") for name in hub.files("me/digits"))
    HfApi().upload_file(repo_id="me/digits", path_in_repo="NOTES.md", path_or_fileobj=b"mine")
    (run / "unet" / "diffusion_pytorch_model.raw.safetensors").unlink()
    push(run, "me/digits")
    left = MODEL - {"unet/diffusion_pytorch_model.raw.safetensors"} | {"NOTES.md"}
    assert set(hub.files("me/digits")) == left


def test_pushing_the_same_files_again_sends_nothing(hub, run):
    first = push(run, "me/digits")
    sent = dict(hub.uploaded_bytes)
    assert push(run, "me/digits") == first
    assert dict(hub.uploaded_bytes) == sent


def test_local_paths_are_not_uploaded(hub, run, tmp_path):
    home = tmp_path / "grace"
    shutil.copytree(run, home / "model")
    pipeline = DDPMCustomPipeline.from_pretrained(home / "model")
    pipeline.save_pretrained(home / "model")  # diffusers stores where it was loaded from
    assert "grace" in (home / "model/model_index.json").read_text() + (home / "model/unet/config.json").read_text()
    settings = json.loads((run / "train_config.json").read_text())
    settings |= {"train_data_dir": "/home/grace/patients", "output_dir": "C:\\Users\\grace\\out", "dataset_name": "a/b",
                 "config": "../grace/my.yaml", "resume_from_checkpoint": "file:///home/grace/x"}  # fmt: skip
    (home / "model/train_config.json").write_text(json.dumps(settings))
    push(home / "model", "me/digits", self_contained=True)
    shown = json.loads(hub.files("me/digits")["train_config.json"])
    assert (shown["train_data_dir"], shown["output_dir"], shown["dataset_name"]) == ("patients", "out", "a/b")
    assert not [name for name, content in hub.files("me/digits").items() if b"grace" in content]


def test_a_local_dataset_is_not_recorded_as_one_of_the_hub(run, tmp_path):
    config = tiny_config(tmp_path / "out", dataset_name=str(tmp_path / "grace"), train_data_dir=None)
    pipeline, images = DDPMCustomPipeline.from_pretrained(run), ImageData(torch.zeros(20, 1, 8, 8).byte())
    process = SimpleNamespace(num_processes=1, mixed_precision="no", device=torch.device("cpu"))
    made = training.Run(config, pipeline, None, images, images, 3, process)
    shutil.copytree(run, tmp_path / "out")
    facts = facts_of(made, before={})
    assert (facts["data"]["name"], facts["data"]["on_hub"]) == ("grace", False)


def test_folders_that_are_links_inside_are_uploaded_too(hub, run):
    (run / "unet").rename(run / "net")
    (run / "unet").symlink_to("net")
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == MODEL


def test_push_deletes_only_files_of_earlier_pushes(hub, run):
    HfApi().create_repo("digits")
    for name in ("pipeline.py", "unet/other/x.safetensors", "notes/log.csv"):
        HfApi().upload_file(repo_id="me/digits", path_in_repo=name, path_or_fileobj=b"mine")
    push(run, "me/digits")
    kept = {"pipeline.py", "unet/other/x.safetensors", "notes/log.csv"}
    assert set(hub.files("me/digits")) == MODEL | kept
    for name in ("run.json", "log.csv", "samples.png"):
        (run / name).unlink()
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == (MODEL | kept) - {"run.json", "log.csv", "samples.png"}


def test_files_that_others_changed_are_kept_with_a_warning(hub, run, caplog):
    push(run, "me/digits", self_contained=True)
    mine = {"unet/diffusion_pytorch_model.fp16.safetensors": b"half", "ddpm_hf_mine.py": b"1", "log.csv": b"mine\n"}
    for name, content in mine.items():
        HfApi().upload_file(repo_id="me/digits", path_in_repo=name, path_or_fileobj=content)
    assert not caplog.records
    for name in ("log.csv", "samples.png"):
        (run / name).unlink()
    push(run, "me/digits")
    there = hub.files("me/digits")
    assert set(there) == (MODEL | mine.keys()) - {"samples.png"}
    assert mine.items() <= there.items()
    assert [r.getMessage() for r in caplog.records] == [
        "the upload kept these files, which are not in the folder, because no earlier push wrote their present "
        "content: log.csv"
    ]
    caplog.clear()
    (run / "log.csv").write_text("anew\n")
    push(run, "me/digits")
    assert hub.files("me/digits")["log.csv"] == b"anew\n"
    assert [r.getMessage() for r in caplog.records] == [
        "the upload replaced these files, whose content no earlier push wrote; the history of the repository keeps "
        "them: log.csv"
    ]


@pytest.mark.parametrize("manifest", [None, b"[1]", b"{", b'{"files": {"samples.png": 3}}', b"[" * 100_000])
def test_without_a_valid_manifest_nothing_is_deleted(hub, run, caplog, manifest):
    push(run, "me/digits")
    repo = hub.repo("me/digits")
    there = hub.files("me/digits") | {"unet/diffusion_pytorch_model.fp16.safetensors": b"half", "NOTES.md": b"mine"}
    there |= {"pushed.json": manifest}
    if manifest is None:  # as pushed by version 0.1.0
        del there["pushed.json"]
    repo.commit("main", there, "", "me")
    (run / "samples.png").unlink()
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == {*there, "pushed.json"}
    (warning,) = (r.getMessage() for r in caplog.records if "kept these files" in r.getMessage())
    assert warning.endswith(": samples.png, unet/diffusion_pytorch_model.fp16.safetensors")
    caplog.clear()
    (run / "loss.png").unlink()
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == {*there, "pushed.json"} - {"loss.png"}
    assert not caplog.records


def test_the_manifest_has_the_checksums_of_the_hub(hub, run):
    push(run, "me/digits")
    listed = json.loads(hub.files("me/digits")["pushed.json"])["files"]
    assert set(listed) == MODEL - {".gitattributes", "pushed.json"}
    for file in HfApi().list_repo_tree("me/digits", recursive=True):
        if file.path in listed:
            assert (file.lfs.sha256 if file.lfs else file.blob_id) == listed[file.path]["sha256" if file.lfs else "git"]


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, run):
    push(run, "me/digits", license="mit")
    push(run, "me/digits")
    card = hub.files("me/digits")["README.md"].decode()
    assert "license: mit" in card  # the licence of the first push
    push(run, "me/digits", license="apache-2.0")
    card = hub.files("me/digits")["README.md"].decode()
    assert "license: apache-2.0" in card
    theirs = card.replace(MARK, "Grace wrote this").encode()
    HfApi().upload_file(repo_id="me/digits", path_in_repo="README.md", path_or_fileobj=theirs)
    (run / "log.csv").write_text("other\n")
    push(run, "me/digits")
    assert hub.files("me/digits")["README.md"] == theirs
    assert hub.files("me/digits")["log.csv"] == b"other\n"


@pytest.mark.parametrize("in_cache", [False, True])
def test_a_card_that_cannot_be_read_is_not_replaced(hub, run, monkeypatch, in_cache):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its own retries
    push(run, "me/digits")
    if in_cache:  # the card before the edit
        HfApi().hf_hub_download("me/digits", "README.md")
    theirs = hub.files("me/digits")["README.md"].decode().replace(MARK, "Grace wrote this").encode()
    hub.plant("me/digits", {"README.md": theirs})
    (run / "log.csv").write_text("other\n")
    hub.fail("README.md", times=100, status=503)
    with pytest.raises(ValueError, match=r"the upload to me/digits failed \(.*503.*to try again"):
        push(run, "me/digits")
    assert hub.files("me/digits")["log.csv"] != b"other\n"
    hub.faults.clear()
    hub.fail("README.md", status=503)
    push(run, "me/digits")
    assert hub.files("me/digits")["log.csv"] == b"other\n"
    assert hub.files("me/digits")["README.md"] == theirs


def test_a_commit_by_others_during_the_push_is_respected(hub, run, monkeypatch):
    push(run, "me/digits")
    theirs = hub.files("me/digits")["README.md"].decode().replace(MARK, "Grace wrote this").encode()
    commit, times = HfApi.create_commit, [1]

    def after_another(*args, **kwargs):
        if times[0]:
            times[0] -= 1
            hub.plant("me/digits", {"README.md": theirs, "samples.png": b"%d" % times[0]})
        return commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", after_another)
    for name in ("log.csv", "samples.png"):
        (run / name).unlink()
    push(run, "me/digits")
    there = hub.files("me/digits")
    assert there["README.md"] == theirs
    assert there["samples.png"] == b"0"
    assert "log.csv" not in there
    (run / "log.csv").write_text("other\n")
    times[0] = 100
    with pytest.raises(ValueError, match=r"failed \(the repository keeps changing during the upload: .*412"):
        push(run, "me/digits")
    assert "log.csv" not in hub.files("me/digits")


@pytest.mark.parametrize(("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo"), (503, None)])
def test_only_status_404_means_that_a_repository_does_not_exist(hub, run, status, code):
    HfApi().create_repo("digits")
    for settings in ({"private": True}, {"create_pr": True}):
        hub.fail("GET /api/models/me/digits", times=9, status=status, code=code)
        with pytest.raises(ValueError, match=f"the Hub could not look up 'me/digits': .*{status}"):
            check_right_to_push("digits", **settings)
        hub.faults.clear()


def test_invalid_licences_raise(hub, run):
    for license in ("foo: bar\n---\n# x", "", "Apache 2"):
        with pytest.raises(ValueError, match="must be a licence identifier of the Hub"):
            push(run, "me/digits", license=license)
    (run / "README.md").write_text("Mine.")
    with pytest.raises(ValueError, match="was edited and is uploaded unchanged; set it there"):
        push(run, "me/digits", license="mit")
    (run / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        push(run, "me/digits")
    assert not hub.repos


def test_a_link_out_of_the_folder_raises(hub, run, tmp_path):
    (tmp_path / "secret").write_text("do not publish")
    (run / "log.csv").unlink()
    (run / "log.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"log.csv is a link to .*secret, outside of"):
        push(run, "me/digits")
    assert not hub.repos


def test_a_card_that_was_edited_in_the_folder_is_uploaded(hub, run):
    card = (run / "README.md").read_text()
    assert MARK in card
    (run / "README.md").write_text(card.replace(MARK, ""))
    for line in ("Grace made this.", "And she made it again."):
        (run / "README.md").write_text((run / "README.md").read_text() + f"\n{line}\n")
        push(run, "me/digits")
        assert line in hub.files("me/digits")["README.md"].decode()


# ---------------------------------------------------------------- private, branches, pull requests


def test_a_private_repository(hub, run, monkeypatch):
    push(run, "me/digits", private=True)
    assert hub.repo("me/digits").private
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(OSError, match="me/digits"):
        DDPMCustomPipeline.from_pretrained("me/digits")
    monkeypatch.delenv("HF_TOKEN")
    DDPMCustomPipeline.from_pretrained("me/digits", token="hf_secret")


def test_private_raises_for_a_public_repository(hub, run, capsys):
    HfApi().create_repo("digits")
    with pytest.raises(ValueError, match="exists and is public"):
        push(run, "me/digits", private=True)
    assert (
        main([*TRAIN, "--output_dir", "other", "--push_to_hub", "--hub_private_repo", "--hub_model_id", "digits"]) == 2
    )
    assert "exists and is public" in capsys.readouterr().err
    assert not Path("other").exists()
    assert set(hub.files("me/digits")) == {".gitattributes"}


def test_a_branch_and_a_pull_request(hub, run):
    push(run, "me/digits")
    main_before = hub.repo("me/digits").sha("main")
    (run / "log.csv").write_text("other\n")
    push(run, "me/digits", revision="long-run")
    assert hub.files("me/digits", "long-run")["log.csv"] == b"other\n"
    (run / "log.csv").write_text("proposed\n")
    address = push(run, "me/digits", create_pr=True)
    assert "/discussions/1" in address
    assert hub.files("me/digits", "refs/pr/1")["log.csv"] == b"proposed\n"
    assert hub.repo("me/digits").sha("main") == main_before
    DDPMCustomPipeline.from_pretrained("me/digits", revision="long-run")
    HfApi().create_tag("me/digits", tag="v1")
    with pytest.raises(ValueError, match="revision='v1' is a tag or a commit"):
        push(run, "me/digits", revision="v1")


def test_a_pull_request_needs_no_right_to_write_and_is_opened_once(hub, run, monkeypatch):
    push(run, "me/digits")
    before = hub.repo("me/digits").sha("main")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match="a pull request would be empty"):
        push(run, "me/digits", create_pr=True)
    (run / "log.csv").write_text("better\n")
    assert "/discussions/1" in push(run, "me/digits", create_pr=True)
    (run / "log.csv").write_text("much better\n")
    hub.fail(r"/commit/", after_bytes=10**9)  # succeeds, but the answer is lost
    with pytest.raises(ValueError, match="to try again"):
        push(run, "me/digits", create_pr=True)
    assert {name for name in hub.repo("me/digits").branches if name != "main"} == {"refs/pr/1", "refs/pr/2"}
    assert hub.repo("me/digits").sha("main") == before
    with pytest.raises(ValueError, match="does not exist on the Hub, or you may not read it"):
        push(run, "me/none", create_pr=True)


# ---------------------------------------------------------------- rights


@pytest.mark.parametrize(
    ("token", "repo_id", "why"),
    [
        (None, "me/digits", "needs a login"),
        ("hf_wrong", "me/digits", "needs a login"),
        ("hf_reader", "me/digits", "token of this login is read-only"),
        ("hf_secret", "you/digits", "me may not write to you, only to me, club"),
        ("hf_fine", "me/digits", "token of this login is read-only"),
        ("hf_secret", "a/b/c", "a/b/c"),
    ],
)
def test_training_raises_at_once_without_the_right_to_write(hub, tmp_path, monkeypatch, capsys, token, repo_id, why):
    scoped = [{"entity": {"name": "me"}, "permissions": ["repo.content.read"]}]
    hub.users["hf_fine"] = {"name": "me", "role": "fineGrained", "orgs": [], "fineGrained": {"scoped": scoped}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert main([*TRAIN, "--push_to_hub", "--hub_model_id", repo_id]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.strip().splitlines()[-1].startswith("ddpm-hf: error: ")
    assert not (tmp_path / "runs").exists()
    assert not hub.repos


def test_logins_with_the_right_to_write(hub, monkeypatch):
    scoped = [{"entity": {"name": "me/digits"}, "permissions": ["repo.write"]}]
    hub.users["hf_fine"] = {"name": "me", "role": "fineGrained", "orgs": [], "fineGrained": {"scoped": scoped}}
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    assert check_right_to_push("digits") == "me/digits"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert check_right_to_push("club/digits") == "club/digits"


def test_a_folder_without_a_pipeline_raises(hub, tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/digits"]) == 2
    assert main(["push", str(tmp_path / "none"), "me/digits"]) == 2
    assert "model_index.json does not exist" in capsys.readouterr().err.splitlines()[0]
    assert not hub.repos


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "break_it",
    [
        lambda hub: hub.fail(r"PUT ", times=1, after_bytes=1000),
        lambda hub: hub.fail(r"/commit/"),
        lambda hub: hub.fail(r"/commit/", after_bytes=10**9),  # succeeds, but the answer is lost
        lambda hub: hub.fail(r"/commit/", times=2, status=503),
        lambda hub: hub.fail(r"repos/create", after_bytes=10**9),
        lambda hub: hub.fail(r"paths-info"),
        lambda hub: hub.fail(r"/tree/"),
    ],
    ids=["weights", "commit", "answer", "unavailable", "create", "check", "look"],
)
def test_push_retries_after_a_broken_connection(hub, run, break_it):
    break_it(hub)
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == MODEL
    assert len(hub.repo("me/digits").commits) == 2  # the Hub makes the first commit
    assert set(hub.uploads.values()) == {1}


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """The seconds that this process waits for, without waiting."""
    found, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: found.append(seconds) if seconds >= 1 else sleep(seconds))
    return found


@pytest.mark.parametrize("status", [429, 503])
def test_one_refusal_of_any_request_of_a_push_is_waited_for(hub, run, slept, status):
    push(run, "me/first")
    requests = {f"{method} {path.split('?')[0]}" for method, path in hub.requests}
    kinds = {re.sub(r"/[0-9a-f]{40,}.*", "/", each) for each in requests}
    assert len(kinds) >= 10
    for number, kind in enumerate(sorted(kinds)):
        slept.clear()
        (run / "log.csv").write_text(f"step\n{number}\n")  # something new to upload
        for path in run.rglob("*.gif"):
            path.write_bytes(b"GIF89a" + bytes([number]))
        hub.fail(re.escape(kind.replace("me/first", f"me/m{number}")), status=status, headers={"Retry-After": "7"})
        push(run, f"me/m{number}")
        assert all(fault.times == 0 for fault in hub.faults), kind
        assert slept in ([7], [8]), kind  # ours, or the client's own
        hub.faults.clear()


@pytest.mark.parametrize("status", [429, 503])
def test_one_refusal_of_any_request_of_a_download_is_waited_for(hub, run, slept, tmp_path, status):
    push(run, "me/digits")
    hub.requests.clear()
    DDPMCustomPipeline.from_pretrained("me/digits", cache_dir=tmp_path / "first")
    requests = sorted({f"{method} {path.split('?')[0]}" for method, path in hub.requests})
    assert len(requests) >= 5
    for number, request in enumerate(requests):
        slept.clear()
        hub.fail(f"^{re.escape(request)}", status=status, headers={"Retry-After": "7"})
        assert DDPMCustomPipeline.from_pretrained("me/digits", cache_dir=tmp_path / str(number))
        assert all(fault.times == 0 for fault in hub.faults), request
        # ours, or the client's own, which asks once more for a file without waiting
        assert slept in ([7], [8]) or (slept == [] and request.startswith("HEAD ")), request
        hub.faults.clear()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "30"}, [30, 30]),
        ({"RateLimit": '"api";r=0;t=40'}, [40, 40]),
        ({"Retry-After": "3600"}, []),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, [1, 2]),
        ({}, [1, 2]),
    ],
)
def test_a_hub_that_goes_on_refusing_ends_in_one_sentence(
    hub, run, slept, monkeypatch, capsys, caplog, headers, expected
):
    monkeypatch.setattr("ddpm_hf.pipelines.loading.WAITS", (1, 2))
    hub.fail("GET /api/whoami-v2", times=99, status=429, headers=headers)
    assert main(["push", str(run), "me/digits"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm-hf: error: the Hub could not look up the login: ")
    assert slept == expected
    waited = [
        f"the Hub asks to wait (status 429): trying again in {seconds} seconds" for seconds in expected if seconds > 2
    ]
    assert [record.message for record in caplog.records if "asks to wait" in record.message] == waited
    assert not hub.repos


def test_the_error_of_a_failed_push_has_the_command_to_try_again(hub, run, capsys):
    hub.quota = 10_000
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["push", str(run), "me/digits", "--private", "--self_contained", "--license", "mit"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "storage limit" in told.err
    assert "hf_secret" not in told.err
    command = re.search("run `(ddpm-hf .*)` to try again", told.err.splitlines()[-1])[1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    hub.quota = None
    assert main(shlex.split(command)[1:]) == 0
    assert set(hub.files("me/digits")) > MODEL
    assert hub.repo("me/digits").private


def test_files_that_arrive_damaged_or_not_at_all_raise(hub, run, monkeypatch):
    there = HfApi.get_paths_info
    monkeypatch.setattr(HfApi, "get_paths_info", lambda *args, **kwargs: there(*args, **kwargs)[1:])
    with pytest.raises(ValueError, match="is missing in the repository or differs"):
        push(run, "me/digits")

    for name, field in (("unet/config.json", "blob_id"), ("samples.png", "sha256")):  # same size, other content

        def other(*args, name=name, field=field, **kwargs):
            infos = there(*args, **kwargs)
            (changed,) = (info for info in infos if info.path == name)
            setattr(changed.lfs if field == "sha256" else changed, field, "0" * 64)
            return infos

        monkeypatch.setattr(HfApi, "get_paths_info", other)
        with pytest.raises(ValueError, match=f"{name} is missing in the repository or differs"):
            push(run, "me/digits")


# ---------------------------------------------------------------- during training


def test_training_uploads_saves_and_the_final_model(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ends = threading.Event()  # the first upload, for which training does not wait
    commit, begun = HfApi.create_commit, []

    def slowly(*args, **kwargs):
        begun.append(kwargs["commit_message"])
        assert len(begun) > 1 or ends.wait(60)
        return commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", slowly)
    saves = []

    def note(run):
        saves.append(run.step)
        if run.finished:
            ends.set()

    monkeypatch.setattr(command, "write_facts_and_card", lambda run: (write_facts_and_card(run), note(run)))
    assert main([*TRAIN, "--checkpointing_steps", "1", *PUSH]) == 0
    assert saves == [1, 2, 3]
    assert begun == ["Train for 1 updates", "Train for 3 updates"]
    repo = hub.repo("me/digits-model")
    assert repo.private
    first, last = [c for c in repo.commits.values() if c.message.startswith("Train")]
    assert first.files["log.csv"].count(b"\n") == 2  # as of the first save
    assert last.files["log.csv"].count(b"\n") == 4
    assert first.files["unet/config.json"] == last.files["unet/config.json"]
    weights = "unet/diffusion_pytorch_model.raw.safetensors"
    assert first.files[weights] != last.files[weights] == Path("runs/digits", weights).read_bytes()
    assert set(last.files) == MODEL
    assert "3 updates, 24 images seen" in last.files["README.md"].decode()
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/digits-model/commit/{repo.sha('main')}"
    assert not list(Path("runs/digits").glob(".part-*"))


def test_training_does_not_wait_for_the_upload_of_a_save(hub, tmp_path, monkeypatch):
    trained = threading.Event()

    class Late(threading.Thread):  # starts only after training has ended
        def run(self):
            assert trained.wait(60)
            super().run()

    monkeypatch.setattr(background, "threading", SimpleNamespace(Thread=Late))
    hub.plant("me/digits-model", {"README.md": f"---\nlicense: mit\n---\n{MARK}\n".encode()})
    pushing, folder, waited, saved = background.PushInBackground(), tmp_path / "out", [], {}

    def save(run):
        if run.step == 1:
            hub.hold()
            model = {"sha256": weights_sha256(run.pipeline.unet), "scheduler": plain_config(run.pipeline.scheduler)}
            metrics = {"fd_train": {"name": "Fréchet distance", "value": 4.0, "stderr": 0.5, "n": 2000}}
            evaluation = json.dumps({"protocol": {"model": model}, "metrics": metrics})
            (folder / "evaluation.json").write_text(evaluation)
            saved.update({name: (folder / name).read_bytes() for name in ("log.csv", *WEIGHTS)})
        begun = time.monotonic()
        pushing(run)
        waited.append(time.monotonic() - begun)

    config = tiny_config(folder, max_train_steps=3, checkpointing_steps=1, hub_model_id="digits-model")
    run = training.train(
        config, callbacks=[calls(on_init_end=pushing.check), calls(on_save=write_facts_and_card), calls(on_save=save)]
    )
    assert max(waited) < 5, waited  # the client waits at least 10 s for an answer
    hub.release()
    trained.set()
    pushing.finish(run)
    first, last = list(hub.repo("me/digits-model").commits.values())[1:]
    assert saved.items() <= first.files.items()
    card = ModelCard(first.files["README.md"].decode())
    assert card.data.license == "mit"
    assert "1 updates of 3" in card.content
    assert "Fréchet distance" in card.content
    assert "evaluation.json" in first.files
    assert "evaluation.json" not in last.files  # it belongs to the weights of the first save
    assert "3 updates" in last.files["README.md"].decode()


@pytest.mark.slow
def test_a_stopped_run_does_not_wait_for_its_upload(hub, tmp_path):
    hub.hold("PUT /lfs/", seconds=600)
    command = [sys.executable, "-m", "ddpm_hf", *TRAIN, "--max_train_steps", "100000", "--checkpointing_steps", "5"]
    env = hub.env(tmp_path / "home", token="hf_secret")
    process = subprocess.Popen([*command, *PUSH], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        while not any(method == "PUT" for method, _ in hub.requests):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "runs/digits").glob(".part-*"))


def test_training_continues_after_a_failed_upload(hub, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    hub.quota = 10_000
    with caplog.at_level(logging.WARNING, "ddpm_hf"):
        assert main([*TRAIN, "--checkpointing_steps", "1", *PUSH]) == 2
    assert "training continues, but the upload to me/digits-model failed" in caplog.text
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the trained model is saved in runs/digits, but the upload" in error
    assert "run `ddpm-hf push runs/digits me/digits-model --private` to try again" in error
    assert json.loads(Path("runs/digits/checkpoint-3/state.json").read_text())["step"] == 3
    hub.quota = None
    assert main(["push", "runs/digits", "me/digits-model", "--private"]) == 0
    assert set(hub.files("me/digits-model")) == MODEL


def test_training_without_push_to_hub_sends_no_request(hub, run):
    assert hub.requests == []


# ---------------------------------------------------------------- without the package

SAMPLE = """
import sys, torch
from {module} import {name} as Pipeline
pipe = Pipeline.from_pretrained({source!r}{more})
settings = dict(num_inference_steps=3, output_type="pt")
images = [pipe(2, generator=torch.Generator().manual_seed(1), scheduler=s, **settings).images for s in (None, "dpm++")]
torch.save(images, {output!r})
print("ddpm_hf" in sys.modules)
"""


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The Python of an environment with the packages of this one except ddpm_hf."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.slow
def test_a_self_contained_repository_samples_the_same_without_the_package(hub, run, elsewhere, tmp_path):
    push(run, "me/digits", self_contained=True)
    push(run, "me/plain")
    here = sample(DDPMCustomPipeline.from_pretrained(run))
    env = hub.env(tmp_path / "home")
    env.pop("PYTHONPATH", None)  # would make the package importable
    no_package = subprocess.run([elsewhere, "-c", "import ddpm_hf"], cwd=tmp_path, env=env, capture_output=True)
    assert b"No module named 'ddpm_hf'" in no_package.stderr
    trusting = ', custom_pipeline="pipeline", trust_remote_code=True'
    stock = {"module": "diffusers", "name": "DiffusionPipeline"}
    ours = {"module": "ddpm_hf", "name": "DDPMCustomPipeline"}
    snapshot = str(HfApi().snapshot_download("me/digits", cache_dir=tmp_path / "files"))
    made = []
    for python, what, source, more in [
        (elsewhere, stock, "me/digits", trusting),
        (elsewhere, stock, "me/digits", ", trust_remote_code=True"),
        (elsewhere, stock, snapshot, trusting),
        (sys.executable, ours, "me/digits", ""),
        (sys.executable, ours, snapshot, ""),
        (sys.executable, ours, "me/plain", ""),
    ]:
        output = str(tmp_path / f"{len(made)}.pt")
        code = SAMPLE.format(**what, source=source, more=more, output=output)
        done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{python == sys.executable}\n"
        assert "Expected types" not in done.stderr
        made.append(torch.load(output))
    for images in made:
        torch.testing.assert_close(images[0], here, rtol=0, atol=0)
        torch.testing.assert_close(images, made[0], rtol=0, atol=0)
    untrusting = SAMPLE.format(**stock, source="me/digits", more="", output="no.pt")
    refused = subprocess.run([elsewhere, "-c", untrusting], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "trust_remote_code=True" in refused.stderr


def test_shipped_code_differs_from_ours_only_in_imports(run):
    files = code_of(run)
    code = {name: content.decode() for name, content in files.items() if name.endswith(".py")}
    package = Path(ddpm_hf.__file__).parent
    rooms = ("models", "schedulers", "pipelines", "utils")
    modules = {path.stem: path for room in rooms for path in (package / room).glob("*.py")}
    needed = re.compile(r"^from ddpm_hf\.\w+\.(\w+) import (\(.*?\)|[^(]*?)\n", re.M | re.S)

    def in_one_file(source: str) -> str:
        return needed.sub(lambda found: in_one_file(modules[found[1]].read_text()), source)

    for name, content in code.items():
        ours = modules[Path(name).stem.split("_")[-1]].read_text()
        if "/" in name:  # a component, in one file with all that it needs
            ours = in_one_file(ours)
        without_rooms = re.sub(r"from ddpm_hf\.(\w+)\.(\w+) import", r"from ddpm_hf.\2 import", ours)
        assert re.sub(r"from \.ddpm_hf_[0-9a-f]{12}_", "from ddpm_hf.", content) == without_rooms
        assert not re.search(r"^\s*(from|import) ddpm_hf", content, re.M)
    # diffusers copies only the modules that pipeline.py itself imports
    imported = set(re.findall(r"^from \.(\w+) import", code["pipeline.py"], re.M))
    assert imported == {Path(name).stem for name in files if name.startswith("ddpm_hf_")}


# ---------------------------------------------------------------- the card


def test_the_card_has_what_was_measured_and_no_more(run):
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license is None
    facts = json.loads((run / "run.json").read_text())
    assert facts["training"]["updates"] == 3
    assert facts["data"]["num_images"] == 1617
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"mse", "nearest_training_image", "legibility"}
    last = (run / "log.csv").read_text().splitlines()[-1].split(",")
    assert results["mse"].metric_value == pytest.approx(float(last[3]), abs=1e-6)
    assert "180 held-out images after update 3" in results["mse"].metric_args["protocol"]
    parameters = sum(p.numel() for p in DDPMCustomPipeline.from_pretrained(run).unet.parameters())
    for words in (f"{parameters:,} parameters", "3 updates, 24 images seen", "CC BY 4.0", "has not chosen one",
                  "![samples]", "(denoising.gif)", "(loss.png)", "torch 2."):  # fmt: skip
        assert words in card.content
    for leftover in ("None", "{{", "}}", "{%", "nan"):
        assert leftover not in card.text
    assert card.text.count("from_pretrained(") == 2
    assert "ddpm-hf sample digits" in card.text


def test_the_card_has_the_evaluation_only_if_it_belongs_to_the_weights(hub, run):
    sha = weights_sha256(DDPMCustomPipeline.from_pretrained(run).unet)
    metrics = {
        "fd_train": {"name": "Fréchet distance (digits features)", "value": 4.0, "stderr": 0.5, "n": 2000},
        "memorization_pixels": {"name": "Is it nearer? z", "value": -0.25, "stderr": None, "n": 1000},
    }
    model = {"sha256": sha, "scheduler": plain_config(LinearNoiseScheduler.from_pretrained(run, subfolder="scheduler"))}
    protocol = {"model": model, "num_samples": 2000, "num_inference_steps": 50, "seed": 7}
    (run / "evaluation.json").write_text(json.dumps({"protocol": protocol, "metrics": metrics}))
    (run / "report.html").write_text("shows images of the data")
    push(str(run), "me/digits")
    there = hub.files("me/digits")
    assert set(there) == {*MODEL, "evaluation.json"}
    card = ModelCard(there["README.md"].decode())
    assert "4.00 ± 0.98 (95 %); n = 2000; samples 2000, steps 50, seed 7" in card.content
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["fd_train"].metric_value == 4.0
    assert found["memorization_pixels"].metric_value == -0.25
    assert "Memorisation of the training images was measured" in card.content

    protocol["model"]["sha256"] = "of other weights"
    (run / "evaluation.json").write_text(json.dumps({"protocol": protocol, "metrics": metrics}))
    push(str(run), "me/digits")
    assert set(hub.files("me/digits")) == MODEL
    assert "Fréchet" not in hub.files("me/digits")["README.md"].decode()
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json"):
        push(str(run), "me/digits")


def test_the_card_of_a_folder_without_training_facts(hub, run, tmp_path):
    pipeline = DDPMCustomPipeline.from_pretrained(run)
    pipeline.save_pretrained(tmp_path / "bare")
    push(tmp_path / "bare", "me/bare")
    card = hub.files("me/bare")["README.md"].decode()
    assert "| data | unknown |" in card
    assert "| training | unknown" in card
    assert "Memorisation of the training images was not measured" in card
    assert "model-index" not in card
    assert "![" not in card
    assert "None" not in card


def test_the_card_names_the_data_of_the_evaluation(hub, run, tmp_path):
    """A converted model has no run.json, and any model can be compared with other images than those of its training."""
    pipeline = DDPMCustomPipeline.from_pretrained(run)
    pipeline.save_pretrained(tmp_path / "bare")
    model = {"sha256": weights_sha256(pipeline.unet), "scheduler": plain_config(pipeline.scheduler)}
    protocol = {"model": model, "reference": {"name": "you/flowers", "as_trained": False}}
    metrics = {"loss_train": {"name": "Loss", "value": 0.25, "stderr": None, "n": 8}}
    for folder in (tmp_path / "bare", run):
        (folder / "evaluation.json").write_text(json.dumps({"protocol": protocol, "metrics": metrics}))
        push(folder, f"me/{folder.name}")
        card = ModelCard(hub.files(f"me/{folder.name}")["README.md"].decode())
        found = {result.metric_type: result for result in card.data.eval_results}
        assert (found["loss_train"].dataset_name, found["loss_train"].dataset_type) == ("you/flowers", "you/flowers")
        assert "compared with you/flowers" in found["loss_train"].metric_args["protocol"]
    assert found["mse"].dataset_name == "digits"


def test_the_card_of_a_class_conditional_model(tmp_path):
    pipeline = DDPMCustomPipeline(tiny_unet(num_classes=10, class_names=list("0123456789")), LinearNoiseScheduler())
    card = str(cards.model_card(pipeline, {}, tmp_path, "me/digits"))
    assert "pipe(class_labels=['0', '1', '2', '3'], num_inference_steps=50)" in card
    assert "--num_inference_steps 50 --class_labels 0 1 2 3\n" in card
    assert "| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |" in card
    assert "pipeline_tag" not in card
    assert "class-conditional" in card
    call = re.search(r"pipe\((.*)\)\.images", card)[1]
    assert len(eval(f"pipe({call.replace('50', '2')}).images", {"pipe": pipeline})) == 4


NAMES = ["é", "$(touch pwned)", "it's", 'a "b" | <c>\nd', "{{ 7 * 7 }}"]


@pytest.mark.parametrize(
    ("unet", "timesteps"),
    [
        ({"num_classes": 5, "class_names": NAMES}, 1000),
        ({"num_classes": 3}, 1000),
        ({}, 20),
        ({"in_channels": 5}, 1000),
        ({"in_channels": 2, "sample_size": (4, 12)}, 1000),
    ],
    ids=["names", "numbers", "few steps", "bands", "not square"],
)
def test_the_calls_in_the_card_work(tmp_path, monkeypatch, capsys, unet, timesteps):
    monkeypatch.chdir(tmp_path)
    pipeline = DDPMCustomPipeline(tiny_unet(**unet), LinearNoiseScheduler(num_train_timesteps=timesteps))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained("my model")
    card = str(cards.model_card(pipeline, {}, Path("my model")))
    call = re.search(r"images = pipe\((.*)\)\.images", card)[1].replace("=50", "=2")
    assert len(eval(f"pipe({call}).images", {"pipe": pipeline})) in (3, 4, 16)
    (command,) = re.findall(r"^ddpm-hf sample .*(?:\nd'.*)?$", card, re.M)
    script = f"ddpm-hf() {{ printf '%s\\0' \"$@\"; }}; {command.replace('50', '2')}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert main(words) == 0
    assert "16 images generated" in capsys.readouterr().out
    assert not Path("pwned").exists()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows if not row.startswith("| |"))
    assert ("{{ 7 * 7 }}" in card) == (unet.get("class_names") == NAMES)
    assert "<c>" not in "".join(rows)


def test_flops_of_a_convolution():
    small, wide = (DDPMUNet(**{**TINY_UNET, "in_channels": channels, "sample_size": 8}) for channels in (1, 2))
    stem, out = TINY_UNET["stem_channels"], TINY_UNET["up_block_out_channels"][-1]
    per_pixel = 2 * 9 * (stem + out)  # 3x3 kernels of one more input and output channel
    assert cards.forward_flops(wide) - cards.forward_flops(small) == 64 * per_pixel


ON_THE_HUB = """
import sys
from datasets import ClassLabel, Dataset, Image
from huggingface_hub import HfApi
from PIL import Image as Pictures
from ddpm_hf.commands import train_callbacks as command
from ddpm_hf.commands.main import main
from ddpm_hf.commands.train_callbacks import write_facts_and_card

pictures = [Pictures.new("RGB", (8, 8), (40 * (n % 6), 0, 0)) for n in range(20)]
data = Dataset.from_dict({"picture": pictures, "kind": [n % 2 for n in range(20)]})
data = data.cast_column("picture", Image()).cast_column("kind", ClassLabel(names=["even", "odd"]))
data.push_to_hub("me/data", private=True)
card = HfApi().hf_hub_download("me/data", "README.md", repo_type="dataset")
text = open(card).read().replace("---\\n", "---\\nlicense: cc-by-4.0\\n", 1)
HfApi().upload_file(repo_id="me/data", repo_type="dataset", path_in_repo="README.md", path_or_fileobj=text.encode())
sys.exit(main([*sys.argv[1:], "--dataset_name", "me/data", "--push_to_hub", "--hub_model_id", "me/model"]))
"""


@pytest.mark.slow
def test_from_a_dataset_on_the_hub_to_a_model_on_the_hub(hub, tmp_path):
    env = hub.env(tmp_path / "home", token="hf_secret")
    command = [sys.executable, "-c", ON_THE_HUB, *TRAIN, "--config", "cifar10", "--class_conditional"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = ModelCard(hub.files("me/model")["README.md"].decode())
    assert card.data.datasets == ["me/data"]
    assert "| data | [me/data](https://huggingface.co/datasets/me/data) |" in card.content
    assert "| licence of the data | cc-by-4.0 |" in card.content
    assert "| classes | 2: even, odd |" in card.content
    assert "18 training images, 2 held-out images" in card.content
    assert "with only 18 training images" in card.content
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("change", [dict.clear, lambda facts: facts["data"].pop("num_images"),
                                    lambda facts: facts["metrics"].append({}), lambda facts: facts.update(data=None),
                                    lambda facts: facts["training"].update(updates="many")])  # fmt: skip
def test_a_damaged_run_json_raises(hub, run, change):
    facts = json.loads((run / "run.json").read_text())
    change(facts)
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"run.json (must hold|or evaluation.json has a missing or invalid entry)"):
        push(run, "me/digits")
    assert not hub.repos


def test_the_card_of_a_stopped_run(tmp_path):
    saves = []

    def stop(run):
        saves.append(run.step)
        if len(saves) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "out"
    config = tiny_config(folder, max_train_steps=9, checkpointing_steps=2)
    run = training.train(config, callbacks=[calls(on_save=stop), calls(on_save=write_facts_and_card)])
    assert saves == [2, 2]
    assert run.step == 2
    facts = json.loads((folder / "run.json").read_text())
    assert facts["training"]["updates"] == run.step
    seen = 2 * run.config.train_batch_size
    assert f"2 updates of 9, {seen} images seen" in (folder / "README.md").read_text()


def test_training_continues_if_the_card_fails(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise KeyError("flops")

    monkeypatch.setattr(cards, "forward_flops", fail)
    config = tiny_config(tmp_path / "out", max_train_steps=4, checkpointing_steps=2)
    assert training.train(config, callbacks=[calls(on_save=write_facts_and_card)]).finished
    assert caplog.text.count("has no model card; training continues") == 2
    assert not (tmp_path / "out/README.md").exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["training"]["updates"] == 4


def test_the_card_names_the_initial_weights(tmp_path, run):
    settings = {"pretrained_model_name_or_path": str(run), "max_train_steps": 2}
    first = training.train(
        tiny_config(tmp_path / "out", unet={}, **settings), callbacks=[calls(on_save=write_facts_and_card)]
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "starting from the weights of a local model" in card
    assert "base_model" not in card
    first.config.pretrained_model_name_or_path = "google/ddpm-cifar10-32"
    write_facts_and_card(first)
    assert "base_model: google/ddpm-cifar10-32" in (tmp_path / "out/README.md").read_text()


def test_the_card_of_a_run_resumed_after_its_end(tmp_path, run):
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 1e-6}
    settings = {"resume_from_checkpoint": str(run / "checkpoint-3"), "max_train_steps": 3, "train_batch_size": 8}
    training.train(
        tiny_config(tmp_path / "out", scheduler=scheduler, **settings), callbacks=[calls(on_save=write_facts_and_card)]
    )
    assert "| wall time | unknown |" in (tmp_path / "out/README.md").read_text()


def test_push_with_a_space(hub, run, capsys):
    assert main(["push", str(run), "me/digits", "--space"]) == 0
    page, model = capsys.readouterr().out.splitlines()[-2:]
    assert page.startswith(f"{hub.url}/spaces/me/digits/commit/")
    assert model.startswith(f"{hub.url}/me/digits/commit/")
    there = hub.files("me/digits", repo_type="space")
    assert set(there) == {".gitattributes", "README.md", "app.py", "requirements.txt", "pushed.json"}
    assert b"from_pretrained('me/digits')" in there["app.py"]


def test_edited_files_of_a_space_are_kept(hub, monkeypatch, caplog):
    space.push_space("me/digits")
    hub.plant("me/digits", {"app.py": b"mine\n", "notes.txt": b"mine too\n"}, repo_type="space")
    files = space.space_files("me/digits")
    for words in ("newer", "newest"):
        monkeypatch.setattr(space, "space_files", lambda repo_id, words=words: {"app.py": words, "README.md": words})
        space.push_space("me/digits")
        there = hub.files("me/digits", repo_type="space")
        assert set(there) == {".gitattributes", "pushed.json", "README.md", "app.py", "notes.txt"}
        assert there["app.py"] == b"mine\n"
        assert there["README.md"] == words.encode()
        assert "kept these files because they were edited on the Hub: app.py" in caplog.text
        caplog.clear()
    monkeypatch.setattr(space, "space_files", lambda repo_id: files)
    hub.plant("me/digits", {"app.py": files["app.py"].encode()}, repo_type="space")  # the edit is reverted
    space.push_space("me/digits")
    assert not caplog.records
