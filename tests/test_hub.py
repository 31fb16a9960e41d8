"""Sharing, against a small server on loopback that speaks the Hub's calls of an upload."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TINY_UNET, tiny_config

from ddpm_hf.hub import model_card
from ddpm_hf.training import train as train_here

ROOT = Path(__file__).parent.parent


class Hub(BaseHTTPRequestHandler):
    """Takes one repository's commit into `server.files`; knows the token `secret` only."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, content=b""):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, {"error": "Invalid username or password."})
        return self.answer(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self):
        server, content = self.server, self.body()
        if self.path == "/api/repos/create":
            server.created = json.loads(content)
            return self.answer(200, {"url": f"{server.url}/me/{server.created['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path and server.refuse:
            return self.answer(403, {"error": "storage is full"})
        if "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{server.url}/me/model/commit/1", "commitOid": "1" * 40})
        return self.answer(404, {"error": self.path})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    server.created, server.refuse = None, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


PUSH = ["--push_to_hub", "--hub_private_repo", "--hub_model_id", "digits-model"]


def train(hub, tmp_path, token, flags=PUSH):
    command = [sys.executable, "-m", "ddpm_hf", "train", "--max_train_steps", "3", "--unet", json.dumps(TINY_UNET)]
    command += flags
    command += ["--train_batch_size", "8", "--eval_batch_size", "1", "--ddpm_num_inference_steps", "2"]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | home | ({"HF_TOKEN": token} if token else {})
    )
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_a_finished_run_is_uploaded(hub, tmp_path):
    done = train(hub, tmp_path, "secret")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/model/commit/1" in done.stdout
    assert hub.created["visibility"] == "private"
    assert hub.created["name"] == "digits-model"
    assert set(hub.files) == {
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "log.csv",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.raw.safetensors",
        "samples.png", "first_samples.png", "loss.png", "denoising.gif", "train_config.json",
    }  # fmt: skip
    out = tmp_path / "runs/digits"
    assert all(content == (out / name).read_bytes() for name, content in hub.files.items())
    card = hub.files["README.md"].decode()
    assert "pipeline_tag: unconditional-image-generation" in card
    assert 'from_pretrained("me/digits-model")' in card
    assert "3 updates, 24 images seen" in card
    assert "$" not in card
    assert not [name for name, content in hub.files.items() if b"secret" in content]


def test_the_card_of_a_model_of_classes_says_how_to_ask(tmp_path):
    run = train_here(tiny_config(tmp_path, class_conditional=True, guidance_scale=1.5))
    card = model_card(run, "me/digits")
    assert """from_pretrained("me/digits")(class_labels=['0', '1', '2', '3'], guidance_scale=1.5)""" in card
    assert "| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |" in card
    assert "pipeline_tag: other" in card
    assert "unconditional" not in card


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_a_login_nothing_begins(hub, tmp_path, token):
    done = train(hub, tmp_path, token)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "push_to_hub needs a login (`hf auth login`)" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert hub.created is None


def test_no_push_unless_asked(hub, tmp_path):
    assert train(hub, tmp_path, "secret", flags=[]).returncode == 0
    assert hub.created is None


def test_a_name_that_cannot_be_is_told_before_training(hub, tmp_path):
    done = train(hub, tmp_path, "secret", flags=["--push_to_hub", "--hub_model_id", "a/b/c"])
    assert done.returncode == 2
    assert "a/b/c" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_upload_that_fails_loses_nothing_and_can_be_tried_again(hub, tmp_path):
    hub.refuse = True
    done = train(hub, tmp_path, "secret")
    assert done.returncode == 2
    assert "is trained and saved in runs/digits, but its upload failed" in done.stderr
    assert "Traceback" not in done.stderr
    weights = (tmp_path / "runs/digits/unet/diffusion_pytorch_model.safetensors").read_bytes()
    hub.refuse = False
    done = train(hub, tmp_path, "secret", flags=[*PUSH, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, done.stderr
    assert hub.files["unet/diffusion_pytorch_model.safetensors"] == weights
