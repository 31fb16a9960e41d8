"""Sharing, against a Hub on loopback that the Hub's own client talks to."""

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

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler, training
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
    """The output folder of a run of three updates, made by the command."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_once, "runs/digits")
    return Path("runs/digits")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("ddpm_hf.hub.push.WAITS", (0, 0))


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(2, generator=generator, num_inference_steps=3, output_type="pt").images


# ---------------------------------------------------------------- what is uploaded


def test_what_belongs_there_is_uploaded_and_its_address_comes_last(hub, run, capsys):
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


def test_a_second_push_takes_out_what_would_be_loaded_and_is_no_more(hub, run):
    push(run, "me/digits", self_contained=True)
    assert any(name.endswith("_unet.py") for name in hub.files("me/digits"))
    HfApi().upload_file(repo_id="me/digits", path_in_repo="NOTES.md", path_or_fileobj=b"mine")
    (run / "unet" / "diffusion_pytorch_model.raw.safetensors").unlink()
    push(run, "me/digits")
    left = MODEL - {"unet/diffusion_pytorch_model.raw.safetensors"} | {"NOTES.md"}
    assert set(hub.files("me/digits")) == left


def test_a_push_of_what_is_there_sends_and_changes_nothing(hub, run):
    first = push(run, "me/digits")
    sent = dict(hub.uploaded_bytes)
    assert push(run, "me/digits") == first
    assert dict(hub.uploaded_bytes) == sent


def test_where_files_were_is_not_told(hub, run, tmp_path):
    home = tmp_path / "grace"
    shutil.copytree(run, home / "model")
    pipeline = DDPMCustomPipeline.from_pretrained(home / "model")
    pipeline.save_pretrained(home / "model")  # with which diffusers keeps where it was loaded from
    assert "grace" in (home / "model/model_index.json").read_text() + (home / "model/unet/config.json").read_text()
    settings = json.loads((run / "train_config.json").read_text())
    settings |= {"train_data_dir": "/home/grace/patients", "output_dir": "C:\\Users\\grace\\out", "dataset_name": "a/b",
                 "config": "../grace/my.yaml", "resume_from_checkpoint": "file:///home/grace/x"}  # fmt: skip
    (home / "model/train_config.json").write_text(json.dumps(settings))
    push(home / "model", "me/digits", self_contained=True)
    shown = json.loads(hub.files("me/digits")["train_config.json"])
    assert (shown["train_data_dir"], shown["output_dir"], shown["dataset_name"]) == ("patients", "out", "a/b")
    assert not [name for name, content in hub.files("me/digits").items() if b"grace" in content]


def test_a_data_set_in_a_folder_is_none_of_the_hub(run, tmp_path):
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


def test_what_is_there_and_nobody_elses_is_deleted(hub, run):
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


def test_what_others_put_there_stays(hub, run, caplog):
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
        "log.csv stay on the Hub, although the folder does not have them: no push is known to have written them as "
        "they are"
    ]
    caplog.clear()
    (run / "log.csv").write_text("anew\n")
    push(run, "me/digits")
    assert hub.files("me/digits")["log.csv"] == b"anew\n"
    assert [r.getMessage() for r in caplog.records] == [
        "log.csv were replaced on the Hub; no push is known to have written what was there, which its history keeps"
    ]


@pytest.mark.parametrize("manifest", [None, b"[1]", b"{", b'{"files": {"samples.png": 3}}', b"[" * 100_000])
def test_where_no_manifest_is_nothing_is_deleted(hub, run, caplog, manifest):
    push(run, "me/digits")
    repo = hub.repo("me/digits")
    there = hub.files("me/digits") | {"unet/diffusion_pytorch_model.fp16.safetensors": b"half", "NOTES.md": b"mine"}
    there |= {"pushed.json": manifest}
    if manifest is None:  # of the version before
        del there["pushed.json"]
    repo.commit("main", there, "", "me")
    (run / "samples.png").unlink()
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == {*there, "pushed.json"}
    (told,) = (r.getMessage() for r in caplog.records if "stay on the Hub" in r.getMessage())
    assert told.startswith("samples.png, unet/diffusion_pytorch_model.fp16.safetensors stay on the Hub")
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


def test_a_card_that_was_edited_on_the_hub_is_theirs(hub, run):
    push(run, "me/digits", license="mit")
    push(run, "me/digits")
    card = hub.files("me/digits")["README.md"].decode()
    assert "license: mit" in card  # it was said once
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
def test_a_hub_that_does_not_answer_has_not_said_that_there_is_no_card(hub, run, monkeypatch, in_cache):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # of the client, which tries again itself
    push(run, "me/digits")
    if in_cache:  # from before it was edited
        HfApi().hf_hub_download("me/digits", "README.md")
    theirs = hub.files("me/digits")["README.md"].decode().replace(MARK, "Grace wrote this").encode()
    hub.plant("me/digits", {"README.md": theirs})
    (run / "log.csv").write_text("other\n")
    hub.fail("README.md", times=100, status=503)
    with pytest.raises(ValueError, match=r"its upload to me/digits failed \(.*503.*tries again"):
        push(run, "me/digits")
    assert hub.files("me/digits")["log.csv"] != b"other\n"
    hub.faults.clear()
    hub.fail("README.md", status=503)
    push(run, "me/digits")
    assert hub.files("me/digits")["log.csv"] == b"other\n"
    assert hub.files("me/digits")["README.md"] == theirs


def test_what_somebody_commits_between_the_look_and_the_commit_is_looked_at_too(hub, run, monkeypatch):
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
    with pytest.raises(ValueError, match=r"failed \(somebody else keeps changing it at the same time: .*412"):
        push(run, "me/digits")
    assert "log.csv" not in hub.files("me/digits")


@pytest.mark.parametrize(("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo"), (503, None)])
def test_only_the_hub_says_that_a_repository_is_not_there(hub, run, status, code):
    HfApi().create_repo("digits")
    for settings in ({"private": True}, {"create_pr": True}):
        hub.fail("GET /api/models/me/digits", times=2, status=status, code=code)
        with pytest.raises(ValueError, match=f"'me/digits' can't be looked up on the Hub: .*{status}"):
            check_right_to_push("digits", **settings)
        hub.faults.clear()


def test_licences_that_can_not_be(hub, run):
    for license in ("foo: bar\n---\n# x", "", "Apache 2"):
        with pytest.raises(ValueError, match="must be an identifier of the Hub's"):
            push(run, "me/digits", license=license)
    (run / "README.md").write_text("Mine.")
    with pytest.raises(ValueError, match="has been edited and is uploaded as it is; say it there"):
        push(run, "me/digits", license="mit")
    (run / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        push(run, "me/digits")
    assert not hub.repos


def test_a_link_to_elsewhere_is_not_followed(hub, run, tmp_path):
    (tmp_path / "secret").write_text("do not publish")
    (run / "log.csv").unlink()
    (run / "log.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"log.csv is a link to .*secret, outside of"):
        push(run, "me/digits")
    assert not hub.repos


def test_a_card_that_somebody_has_edited_is_theirs(hub, run):
    card = (run / "README.md").read_text()
    assert MARK in card
    (run / "README.md").write_text(card.replace(MARK, ""))
    for line in ("Grace made this.", "And she made it again."):
        (run / "README.md").write_text((run / "README.md").read_text() + f"\n{line}\n")
        push(run, "me/digits")
        assert line in hub.files("me/digits")["README.md"].decode()


# ---------------------------------------------------------------- private, branches, pull requests


def test_private(hub, run, monkeypatch):
    push(run, "me/digits", private=True)
    assert hub.repo("me/digits").private
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(OSError, match="me/digits"):
        DDPMCustomPipeline.from_pretrained("me/digits")
    monkeypatch.delenv("HF_TOKEN")
    DDPMCustomPipeline.from_pretrained("me/digits", token="hf_secret")


def test_what_is_public_is_not_taken_for_private(hub, run, capsys):
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


def test_anybody_may_propose_and_does_so_once(hub, run, monkeypatch):
    push(run, "me/digits")
    before = hub.repo("me/digits").sha("main")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match="nothing in it differs from what is there"):
        push(run, "me/digits", create_pr=True)
    (run / "log.csv").write_text("better\n")
    assert "/discussions/1" in push(run, "me/digits", create_pr=True)
    (run / "log.csv").write_text("much better\n")
    hub.fail(r"/commit/", after_bytes=10**9)  # done, and the answer is lost
    with pytest.raises(ValueError, match="tries again"):
        push(run, "me/digits", create_pr=True)
    assert {name for name in hub.repo("me/digits").branches if name != "main"} == {"refs/pr/1", "refs/pr/2"}
    assert hub.repo("me/digits").sha("main") == before
    with pytest.raises(ValueError, match="is not on the Hub, or you may not see it"):
        push(run, "me/none", create_pr=True)


# ---------------------------------------------------------------- who may


@pytest.mark.parametrize(
    ("token", "repo_id", "why"),
    [
        (None, "me/digits", "needs a login"),
        ("hf_wrong", "me/digits", "needs a login"),
        ("hf_reader", "me/digits", "may only read"),
        ("hf_secret", "you/digits", "me may not write to you, but to me, club"),
        ("hf_fine", "me/digits", "may only read"),
        ("hf_secret", "a/b/c", "a/b/c"),
    ],
)
def test_who_may_not_write_is_told_before_training(hub, tmp_path, monkeypatch, capsys, token, repo_id, why):
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


def test_who_may(hub, monkeypatch):
    scoped = [{"entity": {"name": "me/digits"}, "permissions": ["repo.write"]}]
    hub.users["hf_fine"] = {"name": "me", "role": "fineGrained", "orgs": [], "fineGrained": {"scoped": scoped}}
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    assert check_right_to_push("digits") == "me/digits"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert check_right_to_push("club/digits") == "club/digits"


def test_a_folder_that_is_no_pipeline(hub, tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/digits"]) == 2
    assert main(["push", str(tmp_path / "none"), "me/digits"]) == 2
    assert "model_index.json is not there" in capsys.readouterr().err.splitlines()[0]
    assert not hub.repos


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize(
    "break_it",
    [
        lambda hub: hub.fail(r"PUT ", times=1, after_bytes=1000),
        lambda hub: hub.fail(r"/commit/"),
        lambda hub: hub.fail(r"/commit/", after_bytes=10**9),  # done, and the answer is lost
        lambda hub: hub.fail(r"/commit/", times=2, status=503),
        lambda hub: hub.fail(r"repos/create", after_bytes=10**9),
        lambda hub: hub.fail(r"paths-info"),
        lambda hub: hub.fail(r"/tree/"),
    ],
    ids=["weights", "commit", "answer", "unavailable", "create", "check", "look"],
)
def test_a_connection_that_breaks_is_gone_on_with(hub, run, break_it):
    break_it(hub)
    push(run, "me/digits")
    assert set(hub.files("me/digits")) == MODEL
    assert len(hub.repo("me/digits").commits) == 2  # the first is the Hub's own
    assert set(hub.uploads.values()) == {1}


def test_a_full_disk_there_is_told_with_the_command_that_tries_again(hub, run, capsys):
    hub.quota = 10_000
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["push", str(run), "me/digits", "--private", "--self_contained", "--license", "mit"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "storage limit" in told.err
    assert "hf_secret" not in told.err
    command = re.search("`(ddpm-hf .*)` tries again", told.err.splitlines()[-1])[1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    hub.quota = None
    assert main(shlex.split(command)[1:]) == 0
    assert set(hub.files("me/digits")) > MODEL
    assert hub.repo("me/digits").private


def test_what_is_not_there_as_it_was_sent_is_no_success(hub, run, monkeypatch):
    there = HfApi.get_paths_info
    monkeypatch.setattr(HfApi, "get_paths_info", lambda *args, **kwargs: there(*args, **kwargs)[1:])
    with pytest.raises(ValueError, match="is not in the repository as it was sent"):
        push(run, "me/digits")

    for name, field in (("unet/config.json", "blob_id"), ("samples.png", "sha256")):  # as long, and another

        def other(*args, name=name, field=field, **kwargs):
            infos = there(*args, **kwargs)
            (changed,) = (info for info in infos if info.path == name)
            setattr(changed.lfs if field == "sha256" else changed, field, "0" * 64)
            return infos

        monkeypatch.setattr(HfApi, "get_paths_info", other)
        with pytest.raises(ValueError, match=f"{name} is not in the repository as it was sent"):
            push(run, "me/digits")


# ---------------------------------------------------------------- while training


def test_a_run_is_uploaded_at_each_save_and_at_its_end(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ends = threading.Event()  # of the first upload, which the second save waits for and the training does not
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
    assert first.files["log.csv"].count(b"\n") == 2  # as it was then
    assert last.files["log.csv"].count(b"\n") == 4
    assert first.files["unet/config.json"] == last.files["unet/config.json"]
    weights = "unet/diffusion_pytorch_model.raw.safetensors"
    assert first.files[weights] != last.files[weights] == Path("runs/digits", weights).read_bytes()
    assert set(last.files) == MODEL
    assert "3 updates, 24 images seen" in last.files["README.md"].decode()
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/digits-model/commit/{repo.sha('main')}"
    assert not list(Path("runs/digits").glob(".part-*"))


def test_training_does_not_wait_for_the_hub_and_what_is_uploaded_is_the_save(hub, tmp_path, monkeypatch):
    trained = threading.Event()

    class Late(threading.Thread):  # the training may go on as far as it likes before this one gets a turn
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
    assert max(waited) < 5, waited  # the client itself waits for an answer for 10 s and more
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
    assert "evaluation.json" not in last.files  # it is of the weights then
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


def test_an_upload_that_fails_neither_loses_nor_ends_a_run(hub, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    hub.quota = 10_000
    with caplog.at_level(logging.WARNING, "ddpm_hf"):
        assert main([*TRAIN, "--checkpointing_steps", "1", *PUSH]) == 2
    assert "training goes on, but its upload to me/digits-model failed" in caplog.text
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the model is trained and saved in runs/digits, but its upload" in error
    assert "`ddpm-hf push runs/digits me/digits-model --private` tries again" in error
    assert json.loads(Path("runs/digits/checkpoint-3/state.json").read_text())["step"] == 3
    hub.quota = None
    assert main(["push", "runs/digits", "me/digits-model", "--private"]) == 0
    assert set(hub.files("me/digits-model")) == MODEL


def test_no_push_unless_asked(hub, run):
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
    """The Python of an environment with all that this one has, but for ddpm_hf."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.slow
def test_another_environment_pulls_and_samples_the_same_pixels(hub, run, elsewhere, tmp_path):
    push(run, "me/digits", self_contained=True)
    push(run, "me/plain")
    here = sample(DDPMCustomPipeline.from_pretrained(run))
    env = hub.env(tmp_path / "home")
    env.pop("PYTHONPATH", None)  # by which the other one would have the package too
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


def test_shipped_code_is_our_code_but_for_the_names_of_modules(run):
    files = code_of(run)
    package = Path(cards.__file__).parent
    for name, content in files.items():
        if name.endswith(".py"):
            stem = Path(name).stem.split("_")[-1]
            ours = (package / f"{stem}.py").read_text()
            assert re.sub(r"from \.ddpm_hf_[0-9a-f]{12}_", "from ddpm_hf.", content.decode()) == ours
            assert not re.search(r"^\s*(from|import) ddpm_hf", content.decode(), re.M)
    # diffusers copies what pipeline.py itself imports, and no more
    imported = set(re.findall(r"^from \.(\w+) import", files["pipeline.py"].decode(), re.M))
    assert imported == {Path(name).stem for name in files if name.startswith("ddpm_hf_")}


# ---------------------------------------------------------------- the card


def test_the_card_says_what_was_measured_and_no_more(run):
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
    for words in (f"{parameters:,} parameters", "3 updates, 24 images seen", "CC BY 4.0", "not stated", "![samples]",
                  "(denoising.gif)", "(loss.png)", "torch 2."):  # fmt: skip
        assert words in card.content
    for leftover in ("None", "{{", "}}", "{%", "nan"):
        assert leftover not in card.text
    assert card.text.count("from_pretrained(") == 2
    assert "ddpm-hf sample digits" in card.text


def test_an_evaluation_is_in_the_card_as_long_as_the_weights_are_those_that_it_is_of(hub, run):
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
    assert "Memorisation: see what was measured" in card.content

    protocol["model"]["sha256"] = "of other weights"
    (run / "evaluation.json").write_text(json.dumps({"protocol": protocol, "metrics": metrics}))
    push(str(run), "me/digits")
    assert set(hub.files("me/digits")) == MODEL
    assert "Fréchet" not in hub.files("me/digits")["README.md"].decode()
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json"):
        push(str(run), "me/digits")


def test_the_card_of_a_folder_that_nobody_knows_anything_of(hub, run, tmp_path):
    pipeline = DDPMCustomPipeline.from_pretrained(run)
    pipeline.save_pretrained(tmp_path / "bare")
    push(tmp_path / "bare", "me/bare")
    card = hub.files("me/bare")["README.md"].decode()
    assert "| data | not known |" in card
    assert "| training | not known" in card
    assert "Memorisation: not measured" in card
    assert "model-index" not in card
    assert "![" not in card
    assert "None" not in card


def test_the_card_of_a_model_of_classes_says_how_to_ask(tmp_path):
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
def test_what_the_card_says_how_to_call_works(tmp_path, monkeypatch, capsys, unet, timesteps):
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
    assert "16 images made" in capsys.readouterr().out
    assert not Path("pwned").exists()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows if not row.startswith("| |"))
    assert ("{{ 7 * 7 }}" in card) == (unet.get("class_names") == NAMES)
    assert "<c>" not in "".join(rows)


def test_flops_are_those_of_a_convolution_by_hand():
    from ddpm_hf import DDPMUNet

    small, wide = (DDPMUNet(**{**TINY_UNET, "in_channels": channels, "sample_size": 8}) for channels in (1, 2))
    stem, out = TINY_UNET["stem_channels"], TINY_UNET["up_block_out_channels"][-1]
    per_pixel = 2 * 9 * (stem + out)  # of 3x3 weights a channel more of input and of output
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
def test_from_a_data_set_of_the_hub_to_a_model_on_it(hub, tmp_path):
    env = hub.env(tmp_path / "home", token="hf_secret")
    command = [sys.executable, "-c", ON_THE_HUB, *TRAIN, "--config", "cifar10", "--class_conditional"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = ModelCard(hub.files("me/model")["README.md"].decode())
    assert card.data.datasets == ["me/data"]
    assert "| data | [me/data](https://huggingface.co/datasets/me/data) |" in card.content
    assert "| licence of the data | cc-by-4.0 |" in card.content
    assert "| classes | 2: even, odd |" in card.content
    assert "18 images to train on, 2 held out" in card.content
    assert "With 18 images to train on" in card.content
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("change", [dict.clear, lambda facts: facts["data"].pop("num_images"),
                                    lambda facts: facts["metrics"].append({}), lambda facts: facts.update(data=None),
                                    lambda facts: facts["training"].update(updates="many")])  # fmt: skip
def test_run_json_that_is_damaged_is_told(hub, run, change):
    facts = json.loads((run / "run.json").read_text())
    change(facts)
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"run.json (can't be read|is not as training writes it)"):
        push(run, "me/digits")
    assert not hub.repos


def test_a_run_that_is_stopped_has_a_card_of_what_it_had_come_to(tmp_path):
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


def test_a_card_that_can_not_be_made_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise KeyError("flops")

    monkeypatch.setattr(cards, "forward_flops", fail)
    config = tiny_config(tmp_path / "out", max_train_steps=4, checkpointing_steps=2)
    assert training.train(config, callbacks=[calls(on_save=write_facts_and_card)]).finished
    assert caplog.text.count("training goes on, but update") == 2
    assert not (tmp_path / "out/README.md").exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["training"]["updates"] == 4


def test_a_model_that_began_with_another_says_so(tmp_path, run):
    settings = {"pretrained_model_name_or_path": str(run), "max_train_steps": 2}
    first = training.train(
        tiny_config(tmp_path / "out", unet={}, **settings), callbacks=[calls(on_save=write_facts_and_card)]
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "beginning with the weights of a local model" in card
    assert "base_model" not in card
    first.config.pretrained_model_name_or_path = "google/ddpm-cifar10-32"
    write_facts_and_card(first)
    assert "base_model: google/ddpm-cifar10-32" in (tmp_path / "out/README.md").read_text()


def test_a_run_that_is_resumed_behind_its_end_elsewhere_has_a_card(tmp_path, run):
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 1e-6}
    settings = {"resume_from_checkpoint": str(run / "checkpoint-3"), "max_train_steps": 3, "train_batch_size": 8}
    training.train(
        tiny_config(tmp_path / "out", scheduler=scheduler, **settings), callbacks=[calls(on_save=write_facts_and_card)]
    )
    assert "| wall time | not known |" in (tmp_path / "out/README.md").read_text()


def test_a_space_with_the_page(hub, run, capsys):
    assert main(["push", str(run), "me/digits", "--space"]) == 0
    page, model = capsys.readouterr().out.splitlines()[-2:]
    assert page.startswith(f"{hub.url}/spaces/me/digits/commit/")
    assert model.startswith(f"{hub.url}/me/digits/commit/")
    there = hub.files("me/digits", repo_type="space")
    assert set(there) == {".gitattributes", "README.md", "app.py", "requirements.txt", "pushed.json"}
    assert b"from_pretrained('me/digits')" in there["app.py"]


def test_a_space_that_somebody_has_edited_stays_so(hub, monkeypatch, caplog):
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
        assert "app.py stay as somebody has edited them on the Hub" in caplog.text
        caplog.clear()
    monkeypatch.setattr(space, "space_files", lambda repo_id: files)
    hub.plant("me/digits", {"app.py": files["app.py"].encode()}, repo_type="space")  # which they take back
    space.push_space("me/digits")
    assert not caplog.records
