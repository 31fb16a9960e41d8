"""A local server with the API of the Hugging Face Hub: repositories, Git LFS, permissions, and faults on demand.

It keeps everything in memory. Its errors are those of the Hub: a private repository does not exist for users who may
not read it, an LFS object must match its checksum, and a commit may only refer to stored objects.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gif", ".png", ".jpg", ".parquet", ".npz", ".zip")
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class RefusedError(Exception):
    """A response with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message = status, message
        self.headers = headers | {"X-Error-Message": message.encode("ascii", "replace").decode()}
        self.headers |= {"X-Error-Code": code} if code else {}


class HangUpError(Exception):
    """The server closes the connection at this point."""


@dataclass
class Commit:
    files: dict[str, bytes]
    parent: str | None
    message: str
    author: str


@dataclass
class Repo:
    id: str
    type: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # pull requests too, as refs/pr/N
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # stored LFS objects, by SHA-256
    headers: dict[str, dict] = field(default_factory=dict)  # by path: wrong headers of the response for a file

    def commit(self, branch: str, files: dict[str, bytes], message: str, author: str, parent: str | None = None) -> str:
        parent = self.branches.get(branch, parent)
        tree = [(path, git_oid(content)) for path, content in sorted(files.items())]
        sha = hashlib.sha1(repr((self.id, parent, message, len(self.commits), tree)).encode()).hexdigest()
        self.commits[sha] = Commit(files, parent, message, author)
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        name = revision.removeprefix("refs/heads/")
        if found := self.branches.get(name) or self.tags.get(name):
            return found
        found = [sha for sha in self.commits if len(name) >= 7 and sha.startswith(name)]
        if len(found) != 1:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.sha(revision)].files

    def stored(self) -> int:
        contents = {content for commit in self.commits.values() for content in commit.files.values()}
        return sum(map(len, contents | set(self.objects.values())))


@dataclass
class Fault:
    pattern: str
    times: int
    status: int | None
    after_bytes: int | None
    code: str | None
    headers: dict[str, str]


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    content: bytes

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    def json(self):
        return json.loads(self.content or b"{}")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > 1_000_000)


def file_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path, len(content)):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry["oid"] = git_oid(pointer)
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
    return entry


def parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`. Tests may read and change its attributes."""

    def __init__(self):
        me = {"name": "me", "orgs": [{"name": "club", "roleInOrg": "write"}]}
        self.users = {
            "hf_secret": me | {"role": "write"},
            "hf_reader": me | {"role": "read"},
            "hf_other": {"name": "you", "role": "write", "orgs": []},
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: Counter[str] = Counter()  # complete LFS uploads, by SHA-256
        self.uploaded_bytes: Counter[str] = Counter()  # bytes of LFS uploads, including incomplete ones
        self.unknown: list[tuple[str, str]] = []  # requests that this server does not support
        self.quota: int | None = None  # bytes
        self.page_size = 1000
        self.faults: list[Fault] = []
        self.held, self.seconds, self.released = None, None, threading.Event()
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub, self.url = self, f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release()
        self._server.shutdown()
        self._server.server_close()
        # Clients keep connections open, on which a stopped server would still answer.
        for connection in list(self.connections):
            hang_up(connection)

    def env(self, home, token: str | None = None) -> dict[str, str]:
        """The environment of a process that uses only this server, without the login and cache of the machine."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME")
        env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        return env | dict.fromkeys(switches, "1") | ({"HF_TOKEN": token} if token else {})

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        return dict(self.repo(repo_id, repo_type).files(revision))

    def plant(self, repo_id, files, private=False, revision="main", repo_type="model", headers=None) -> str:
        """Commit `files` without checks; `headers` {path: {name: value}} are added to the responses for them."""
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type, private))
            before = repo.files(revision) if revision in repo.branches else {}
            lfs = [content for path, content in files.items() if is_lfs(path, len(content))]
            repo.objects |= {hashlib.sha256(content).hexdigest(): content for content in lfs}
            repo.headers |= headers or {}
            return repo.commit(revision, before | files, "Planted", repo_id.split("/")[0])

    def fail(
        self, pattern: str, times=1, status: int | None = None, after_bytes: int | None = None, code=None, headers=None
    ):
        """Let the next `times` requests whose "METHOD path" matches fail.

        With a status, the response has that status and, if given, the error code of the Hub and more headers. Otherwise
        the connection breaks: at once, or after so many bytes of the body of the request (upload) or the response
        (download). An upload of fewer bytes than `after_bytes` succeeds, and only its response is lost.
        """
        self.faults.append(Fault(pattern, times, status, after_bytes, code, headers or {}))

    def hold(self, pattern: str = "", seconds: float = 20):
        """Delay requests whose "METHOD path" matches until `release`, but at most `seconds`."""
        self.held, self.seconds, self.released = pattern, seconds, threading.Event()

    def release(self):
        self.held = None
        self.released.set()

    def wait_for_release(self, line: str):
        if self.held is not None and re.search(self.held, line):
            self.released.wait(self.seconds)

    def next_fault(self, line: str) -> Fault | None:
        with self.lock:
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if fault:
                fault.times -= 1
            return fault

    def handle(self, request: Request):
        for methods, pattern, call in ROUTES:
            if request.method in methods and (match := re.fullmatch(pattern, request.path)):
                return call(self, request, *(unquote(group) if group else group for group in match.groups()))
        self.unknown.append((request.method, request.path))
        raise RefusedError(404, f"Not found: {request.path}")

    # Permissions

    def user(self, request: Request, needed: bool = True) -> dict | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise RefusedError(401, "Invalid username or password.")
        return self.users[token] if token else None

    @staticmethod
    def may(user: dict | None, name: str, write: bool) -> bool:
        """Whether the token may read or write in a namespace or repository."""
        owner = name.split("/")[0]
        if user is None:
            return False
        if user["role"] == "fineGrained":
            scopes = [s for s in user["fineGrained"]["scoped"] if s["entity"]["name"] in (owner, name)]
            wanted = {"repo.write"} if write else {"repo.write", "repo.content.read"}
            return any(wanted & set(scope["permissions"]) for scope in scopes)
        orgs = [org["name"] for org in user["orgs"] if not write or org["roleInOrg"] in ("write", "admin")]
        return owner in [user["name"], *orgs] and (user["role"] == "write" or not write)

    def find(self, request: Request, repo_type: str | None, repo_id: str, write=False, propose=False) -> Repo:
        repo, user = (
            self.repos.get(((repo_type or "model").removesuffix("s"), repo_id)),
            self.user(request, needed=False),
        )
        if repo is None or (repo.private and not self.may(user, repo_id, write=False)):
            refusal = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise RefusedError(*refusal, code="RepoNotFound")
        if write or propose:
            self.user(request)
        if (write and not self.may(user, repo_id, write=True)) or (propose and user["role"] == "read"):
            raise RefusedError(403, "Forbidden: you don't have write access to this repository")
        return repo

    def make_room(self, size: int):
        if self.quota is not None and sum(repo.stored() for repo in self.repos.values()) + size > self.quota:
            raise RefusedError(403, "Private repository storage limit reached, please upgrade your plan")

    # Accounts and repositories

    def whoami(self, request):
        user = self.user(request)
        token = {"displayName": "test", "role": user["role"]} | {k: user[k] for k in ("fineGrained",) if k in user}
        account = {"type": "user", "id": user["name"], "name": user["name"], "fullname": user["name"], "isPro": False}
        orgs = [{"type": "org", "isEnterprise": False} | org for org in user["orgs"]]
        return account | {"orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def repos_call(self, request, action):
        user, wish = self.user(request), request.json()
        owner, repo_type = wish.get("organization") or user["name"], wish.get("type", "model")
        repo_id = f"{owner}/{wish['name']}"
        url = f"{self.url}/{PREFIXES[repo_type]}{repo_id}"
        if action == "delete":
            repo = self.find(request, repo_type, repo_id, write=True)
            del self.repos[repo.type, repo.id]
            return {}
        if not re.fullmatch(r"[\w.-]{1,96}", wish["name"]):
            raise RefusedError(400, f"Invalid repository name: {wish['name']}")
        if not self.may(user, owner, write=True):
            raise RefusedError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"')
        if (repo_type, repo_id) in self.repos:
            return 409, {}, {"error": f"You already created this {repo_type} repo", "url": url}
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, wish.get("visibility") == "private")
        repo.commit("main", {".gitattributes": ATTRIBUTES}, "initial commit", user["name"])
        return {"url": url, "name": repo_id, "id": repo_id}

    def settings(self, request, kind, repo_id):
        repo = self.find(request, kind, repo_id, write=True)
        if "visibility" in request.json():
            repo.private = request.json()["visibility"] == "private"
        return {"visibility": "private" if repo.private else "public"}

    def auth_check(self, request, kind, repo_id, write):
        self.find(request, kind, repo_id, write=bool(write))
        return {}

    def info(self, request, kind, repo_id, revision):
        repo = self.find(request, kind, repo_id)
        sha = repo.sha(revision or "main")
        entries = [file_entry(path, content) for path, content in sorted(repo.commits[sha].files.items())]
        blobs = [{"blobId": e["oid"]} | e if request.flag("blobs") else {} for e in entries]
        siblings = [{"rfilename": e["path"]} | blob for e, blob in zip(entries, blobs)]
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "private": repo.private, "gated": False}
        info |= {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "createdAt": DATE, "lastModified": DATE}
        info |= {"usedStorage": repo.stored(), "siblings": siblings}
        wanted = request.query.get("expand")
        return {k: v for k, v in info.items() if k == "id" or k in wanted} if wanted else info

    # References

    def refs(self, request, kind, repo_id):
        repo = self.find(request, kind, repo_id)
        refs = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, sha in repo.branches.items():
            pull, ref = name.startswith("refs/pr/"), name if name.startswith("refs/") else f"refs/heads/{name}"
            entry = {"name": name.removeprefix("refs/pr/"), "ref": ref, "targetCommit": sha}
            refs["pullRequests" if pull else "branches"].append(entry)
        refs["tags"] = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        return refs if request.flag("include_prs") else {k: v for k, v in refs.items() if k != "pullRequests"}

    def reference(self, request, kind, repo_id, what, name):
        """Create a branch by its name or a tag at a revision, or delete either by its name."""
        repo = self.find(request, kind, repo_id, write=True)
        refs = repo.branches if what == "branch" else repo.tags
        if request.method == "DELETE":
            if name not in refs or name == "main":
                raise RefusedError(404 if name not in refs else 403, f"Cannot delete {name}", "RevisionNotFound")
            del refs[name]
            return {}
        wish = request.json()
        name, start = (name, wish.get("startingPoint", "main")) if what == "branch" else (wish["tag"], name)
        sha = repo.sha(start)
        if name in refs:
            raise RefusedError(409, f"Reference already exists: {name}")
        refs[name] = sha
        return {}

    def commits(self, request, kind, repo_id, revision):
        repo = self.find(request, kind, repo_id)
        sha, log = repo.sha(revision), []
        while sha:
            commit = repo.commits[sha]
            log.append({"id": sha, "title": commit.message, "message": "", "authors": [{"user": commit.author}]})
            log[-1]["date"], sha = DATE, commit.parent
        return self.page(request, log)

    # Files

    def page(self, request, entries):
        start, size = (int(request.query.get(k, [d])[0]) for k, d in (("cursor", 0), ("limit", self.page_size)))
        query = {k: v for k, v in request.query.items() if k != "cursor"} | {"cursor": start + size}
        link = f'<{self.url}{request.path}?{urlencode(query, doseq=True)}>; rel="next"'
        return 200, {"Link": link} if start + size < len(entries) else {}, entries[start : start + size]

    def entry(self, repo, sha, path, expand):
        """The file or folder at a path, or None."""
        files = repo.commits[sha].files
        entry = file_entry(path, files[path]) if path in files else None
        if entry is None and any(path in parents(name) for name in files):
            entry = {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
        if entry and expand:
            entry["lastCommit"] = {"id": sha, "title": repo.commits[sha].message, "date": DATE}
        return entry

    def tree(self, request, kind, repo_id, revision, folder):
        repo = self.find(request, kind, repo_id)
        sha, inside = repo.sha(revision), f"{folder}/" if folder else ""
        names = {name for path in repo.commits[sha].files for name in [*parents(path), path] if name.startswith(inside)}
        names = {name for name in names if request.flag("recursive") or "/" not in name[len(inside) :]}
        if folder in repo.commits[sha].files:
            names = {folder}
        if folder and not names:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = [self.entry(repo, sha, name, request.flag("expand")) for name in sorted(names)]
        return self.page(request, entries)

    def paths_info(self, request, kind, repo_id, revision):
        repo = self.find(request, kind, repo_id)
        sha, is_json = repo.sha(revision), "json" in request.headers.get("content-type", "")
        wish = request.json() if is_json else parse_qs(request.content.decode())
        expand = wish.get("expand") in (True, ["true"])
        entries = [self.entry(repo, sha, path.strip("/"), expand) for path in wish.get("paths", [])]
        return [entry for entry in entries if entry]

    def resolve(self, request, kind, repo_id, revision, path):
        repo = self.find(request, kind, repo_id)
        sha = repo.sha(revision)
        if path not in repo.commits[sha].files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        content = repo.commits[sha].files[path]
        entry, size, status = file_entry(path, content), len(content), 200
        etag = f'"{entry.get("lfs", entry)["oid"]}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "text/plain"}
        if "lfs" in entry:
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": etag, "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "")):
            first, last = match.groups()
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            if start >= size:
                raise RefusedError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
            status, content = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return status, headers | repo.headers.get(path, {}), content

    # Uploads

    def validate_yaml(self, request):
        content = request.json()["content"]
        if content.startswith("---") and not re.match(r"---\s.*?\n---\s", content + "\n", re.S):
            return 400, {}, {"errors": [{"message": "Metadata has no end"}], "warnings": []}
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return {"errors": [], "warnings": [] if content.startswith("---") else [warning]}

    def preupload(self, request, kind, repo_id, revision):
        propose = request.flag("create_pr")
        repo, wish = self.find(request, kind, repo_id, write=not propose, propose=propose), request.json()
        there = repo.files(revision)
        ignore = wish.get("gitIgnore", there.get(".gitignore", b"").decode()).splitlines()
        files = []
        for wanted in wish["files"]:
            path = wanted["path"]
            mode = "lfs" if is_lfs(path, wanted["size"]) else "regular"
            names = [path, *parents(path), *path.split("/")]
            ignored = any(fnmatch.fnmatch(name, pattern.strip("/")) for name in names for pattern in ignore)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored})
            if path in there:  # from this, the client detects unchanged files
                entry = file_entry(path, there[path])
                files[-1]["oid"] = entry.get("lfs", entry)["oid"]
        return {"files": files, "commitOid": repo.sha(revision)}

    def lfs_batch(self, request, kind, repo_id):
        wish = request.json()
        proposed = "ref" not in wish
        repo = self.find(request, kind, repo_id, write=not proposed, propose=proposed)
        new = [item for item in wish["objects"] if item["oid"] not in repo.objects]
        self.make_room(sum(item["size"] for item in new))
        answers, base = [], f"{self.url}/{PREFIXES[repo.type]}{repo_id}.git/info/lfs"
        for item in wish["objects"]:
            answers.append({"oid": item["oid"], "size": item["size"]})
            if item in new:
                upload = f"{self.url}/lfs/{repo.type}s/{repo_id}/{item['oid']}/{item['size']}"
                answers[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{base}/verify"}}
        return {"transfer": "basic", "objects": answers}

    def lfs_verify(self, request, kind, repo_id):
        repo, wish = self.find(request, kind, repo_id, propose=True), request.json()
        if len(repo.objects.get(wish["oid"], b"")) != wish["size"]:
            raise RefusedError(404, f"No object {wish['oid']}")
        return {}

    def lfs_put(self, request, kind, repo_id, oid, size):
        repo, content = self.repos[kind.removesuffix("s"), repo_id], request.content
        if hashlib.sha256(content).hexdigest() != oid or len(content) != int(size):
            raise RefusedError(400, f"The content sent is not {oid}")
        self.make_room(len(content))
        self.uploads[oid] += 1
        repo.objects[oid] = content
        return {}

    def commit(self, request, kind, repo_id, revision):
        propose = request.flag("create_pr")
        repo = self.find(request, kind, repo_id, write=not propose, propose=propose)
        parent, files, header, new = repo.sha(revision), dict(repo.files(revision)), {}, 0
        if revision not in repo.branches:
            raise RefusedError(400, f"{revision} is not a branch")
        for line in map(json.loads, request.content.splitlines()):
            key, value = line["key"], line["value"]
            path = value.get("path", "")
            if key == "header":
                header = value
                wanted = repo.sha(value.get("parentCommit", parent))
                if wanted != parent and not propose:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
                parent, files = wanted, dict(repo.files(wanted))
            elif any(part in ("", ".", "..", ".git") for part in path.removesuffix("/").split("/")):
                raise RefusedError(400, f"Invalid path: {path}")
            elif key == "file":
                is_base64 = value.get("encoding") == "base64"
                files[path] = base64.b64decode(value["content"]) if is_base64 else value["content"].encode()
                new += len(files[path])
            elif key == "lfsFile":
                content = repo.objects.get(value["oid"])
                if content is None or len(content) != value.get("size", len(content)):
                    raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = content
            elif key == "copyFile":
                files[path] = repo.files(value.get("srcRevision", revision))[value["srcPath"]]
            elif key in ("deletedFile", "deletedFolder"):
                folder = f"{path.rstrip('/')}/"
                gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
                if not gone:
                    raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: content for name, content in files.items() if name not in gone}
            else:
                raise RefusedError(400, f"Unknown operation: {key}")
        self.make_room(new)
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        branch = f"refs/pr/{number}" if propose else revision
        sha = repo.commit(branch, files, header["summary"], self.user(request)["name"], parent)
        page = f"{self.url}/{PREFIXES[repo.type]}{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if propose else {})


NAME = "([^/]+(?:/[^/]+)?)"
REVISION = "(refs/(?:pr|heads|convert)/[^/]+|[^/]+)"
API = f"/api/(models|datasets|spaces)/{NAME}"
WEB = f"/(?:(datasets|spaces)/)?{NAME}"
READ = ("GET", "HEAD")
ROUTES = [
    (READ, "/api/whoami-v2", HubServer.whoami),
    (("POST", "DELETE"), "/api/repos/(create|delete)", HubServer.repos_call),
    (("POST",), "/api/validate-yaml", HubServer.validate_yaml),
    (("PUT",), f"{API}/settings", HubServer.settings),
    (READ, f"{API}/auth-check(/write)?", HubServer.auth_check),
    (READ, f"{API}/refs", HubServer.refs),
    (("POST", "DELETE"), f"{API}/(branch|tag)/{REVISION}", HubServer.reference),
    (READ, f"{API}/commits/{REVISION}", HubServer.commits),
    (READ, f"{API}/tree/{REVISION}(?:/(.*))?", HubServer.tree),
    (("POST",), f"{API}/paths-info/{REVISION}", HubServer.paths_info),
    (("POST",), f"{API}/preupload/{REVISION}", HubServer.preupload),
    (("POST",), f"{API}/commit/{REVISION}", HubServer.commit),
    (READ, f"{API}(?:/revision/{REVISION})?", HubServer.info),
    (("POST",), rf"{WEB}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    (("POST",), rf"{WEB}\.git/info/lfs/verify", HubServer.lfs_verify),
    (("PUT",), f"/lfs/(models|datasets|spaces)/{NAME}/([0-9a-f]+)/([0-9]+)", HubServer.lfs_put),
    (READ, f"{WEB}/resolve/{REVISION}/(.+)", HubServer.resolve),
]


def hang_up(connection: socket.socket):
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client has closed it


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def finish(self):
        self.server.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def read(self, limit: int | None) -> bytes:
        """The body of the request; raises HangUpError if it is longer than `limit`."""
        content, whole = b"", False
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while not whole and (limit is None or len(content) < limit):
                size = int(self.rfile.readline().split(b";")[0], 16)
                content, whole = content + self.rfile.read(size), size == 0
                self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(length if limit is None else min(length, limit))
            whole = len(content) == length
        if self.path.startswith("/lfs/"):
            with self.server.hub.lock:
                self.server.hub.uploaded_bytes[self.path.split("/")[-2]] += len(content[:limit])
        if not whole:
            raise HangUpError
        return content

    def send(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
            if cut is not None or int(headers.get("Content-Length", len(content))) != len(content):
                raise HangUpError

    def serve(self):
        hub, url, sends = self.server.hub, urlsplit(self.path), self.command not in READ
        hub.requests.append((self.command, self.path))
        hub.wait_for_release(f"{self.command} {self.path}")
        fault = hub.next_fault(f"{self.command} {self.path}")
        breaks = fault is not None and fault.status is None
        cut = fault.after_bytes if breaks else None
        try:
            if breaks and (cut is None or self.command == "HEAD"):
                raise HangUpError
            content = self.read(cut if sends else None)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, url.path, parse_qs(url.query, keep_blank_values=True), headers, content)
            try:
                if fault and not breaks:
                    raise RefusedError(fault.status, "a fault on demand", fault.code, **fault.headers)
                with hub.lock:
                    answer = hub.handle(request)
            except RefusedError as refusal:
                answer = refusal.status, refusal.headers, {"error": refusal.message}
            if breaks and sends:
                raise HangUpError
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
            if not isinstance(body, bytes):
                headers, body = {"Content-Type": "application/json"} | headers, json.dumps(body).encode()
            self.send(status, headers, body, cut)
        except (HangUpError, ConnectionError):
            self.close_connection = True
            hang_up(self.connection)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815
