"""A stand-in for the Hugging Face Hub on loopback: enough of it for huggingface_hub's downloads and uploads.

    with FakeHub() as hub:
        hub.add("apple/OpenELM-270M", folder)
        hub.add("datasets/owner/name", folder)
        hub.url         # for HF_ENDPOINT
        hub.requests    # [("GET", "/apple/OpenELM-270M/resolve/<commit>/config.json"), ...]

Repositories are served from local folders, read at each request. Requests that are not handled below get a 404.
Uploads need a token (`hf_writer` is that of `me`) and are stored in temporary folders; `hub.commits` lists them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A served folder. `refs` are the branches and tags; the commit is a hash of the content."""

    folder: Path
    refs: set[str] = field(default_factory=lambda: {"main"})
    gated: int | None = None  # the status of requests for files: 401 without a token, 403 with one
    broken: str | None = None  # transfers of this file break off half-way, every time
    private: bool = False
    branches: dict[str, Path] = field(default_factory=dict)  # folders of branches with content of their own

    def at(self, revision: str) -> Repo:
        """The repository at a branch or a commit."""
        for branch, folder in self.branches.items():
            other = replace(self, folder=folder, branches={})
            if revision in (branch, other.commit()):
                return other
        return self

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def commit(self) -> str:
        content = hashlib.sha1()
        for name in self.files():
            content.update(name.encode() + blob_id(self.folder / name).encode())
        return content.hexdigest()

    def has(self, revision: str) -> bool:
        return revision in self.refs or revision in self.branches or revision == self.at(revision).commit()


def blob_id(path: Path) -> str:
    """The id git gives a file's content, which the hub uses as the ETag of small files."""
    found = path.stat()
    return _blob_id(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(1 << 10)
def _blob_id(path: Path, *version: int) -> str:
    """The id of a version of a file; every answer needs those of a whole folder."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The server. Attributes may be changed while it runs.

    `status` is the answer to every request (500, 503, 429); `rejects_token` treats every token as wrong.
    For uploads: `forbids` answers writes with 403, `breaks_uploads` closes the connection in the midst of a large
    file, `rejects_card` finds fault with every card, `meanwhile` is called while a card is checked, `fails_at` is the
    part of a path that answers with 500.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None
        self.rejects_token = False
        self.tokens = {"hf_writer": "me", "hf_reader": "me"}
        self.forbids = self.breaks_uploads = self.rejects_card = False
        self.fails_at: str | None = None
        self.meanwhile: Callable[[], None] | None = None
        self.commits: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}  # large files that arrived, by SHA-256
        self._storage = tempfile.TemporaryDirectory()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._running = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def files_sent(self) -> list[str]:
        """The names of the files whose content was requested, in order."""
        requested = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in requested]

    def add(self, name: str, folder: Path, **switches: object) -> Repo:
        self.repos[name] = Repo(Path(folder), **switches)  # type: ignore[arg-type]
        return self.repos[name]

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._storage.name))

    def start(self) -> FakeHub:
        self._thread.start()
        self._running = True
        return self

    def stop(self) -> None:
        """Close the port: clients see a refused connection from here on."""
        if self._running:
            self._running = False
            self._server.shutdown()
            self._server.server_close()

    def __enter__(self) -> FakeHub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._storage.cleanup()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.status is not None:
            self._send_error(self.hub.status, "")
        elif self.hub.rejects_token:
            self._send_error(401, "", "Invalid credentials in Authorization header")
        elif self.hub.fails_at is not None and self.hub.fails_at in path:
            self._body()
            self._send_error(500, "")
        elif path == "/api/whoami-v2" or self.command in ("POST", "PUT"):
            self._answer_writer(path)
        elif path.startswith("/api/models/"):
            self._answer_api(path.removeprefix("/api/models/"))
        elif path.startswith("/api/datasets/"):
            self._answer_api(path.removeprefix("/api/datasets/"), "datasets/")
        else:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._answer_file(name, revision, file)

    def _answer_api(self, path: str, kind: str = "") -> None:
        """`owner/repo`, `owner/repo/revision/REV` or `owner/repo/tree/REV`."""
        parts = path.split("/", 3)
        name, what, revision = kind + "/".join(parts[:2]), parts[2:3], "/".join(parts[3:]) or "main"
        repo = self._repo_at(name, revision)
        if repo is None:
            return
        if what == ["tree"]:
            sizes = {file: (repo.folder / file).stat().st_size for file in repo.files()}
            tree = [
                {"type": "file", "path": file, "size": size, "oid": blob_id(repo.folder / file)}
                for file, size in sizes.items()
            ]
            self._send_json(tree)
        else:
            siblings = [{"rfilename": file} for file in repo.files()]
            facts = {"id": name, "modelId": name, "sha": repo.commit(), "private": repo.private, "tags": []}
            self._send_json(facts | {"siblings": siblings})

    def _answer_file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo_at(name, revision)
        if repo is None:
            return
        if repo.gated is not None:
            self._send_error(repo.gated, "GatedRepo", f"Access to model {name} is restricted.")
        elif file not in repo.files():
            self._send_error(404, "EntryNotFound")
        else:
            self._send_file(repo, file)

    def _repo_at(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._send_error(404, "RepoNotFound", "Repository not found")
        elif not repo.has(revision):
            self._send_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            repo = None
        return repo and repo.at(revision)

    def _send_file(self, repo: Repo, file: str) -> None:
        data = (repo.folder / file).read_bytes()
        byte_range = self.headers.get("Range")
        start = int(byte_range.removeprefix("bytes=").split("-")[0]) if byte_range else 0
        self.send_response(206 if byte_range else 200)
        self.send_header("X-Repo-Commit", repo.commit())
        self.send_header("ETag", f'"{blob_id(repo.folder / file)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", str(len(data) - start))
        if byte_range:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            # Each transfer breaks off at the same byte, so a client that resumes gets nothing more.
            end = len(data) // 2 if repo.broken == file else len(data)
            self.wfile.write(data[start:end])

    def _send_json(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_error(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    # Uploads

    def _answer_writer(self, path: str) -> None:
        if path.startswith("/lfs/") and self.hub.breaks_uploads:
            self.rfile.read(100)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        body = self._body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):  # a signed address, which needs no token
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.objects[oid] = body
            self._send_json({})
        elif token not in self.hub.tokens:
            self._send_error(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/whoami-v2":
            role = "read" if token == "hf_reader" else "write"
            user = {"name": self.hub.tokens[token], "auth": {"accessToken": {"displayName": "test", "role": role}}}
            self._send_json({"type": "user", "orgs": []} | user)
        elif path == "/api/validate-yaml":
            if self.hub.meanwhile is not None:
                self.hub.meanwhile()
            fault = {"errors": [{"message": '"license" must be one of [mit]'}], "warnings": []}
            self._send_json(fault if self.hub.rejects_card else {}, 400 if self.hub.rejects_card else 200)
        elif self.hub.forbids:
            self._send_error(403, "", "You don't have the rights")
        elif path == "/api/repos/create":
            self._create(json.loads(body), self.hub.tokens[token])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._send_json(
                {"transfer": "basic", "objects": [self._place(item) for item in json.loads(body)["objects"]]}
            )
        elif path == "/verify":
            item = json.loads(body)
            is_here = len(self.hub.objects.get(item["oid"], b"")) == item["size"]
            self._send_json({}, 200 if is_here else 400)
        else:
            self._answer_change(path.removeprefix("/api/models/"), body)

    def _create(self, request: dict[str, Any], user: str) -> None:
        name = f"{request['organization'] or user}/{request['name']}"
        exists = name in self.hub.repos
        if not exists:
            repo = self.hub.add(name, self.hub.new_folder(), private=request.get("visibility") == "private")
            (repo.folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self._send_json({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        """Where to send a large file; nowhere if the server has it already."""
        if item["oid"] in self.hub.objects:
            return item
        verify = {"href": f"{self.hub.url}/verify"}
        return item | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}, "verify": verify}}

    def _answer_change(self, path: str, body: bytes) -> None:
        """`owner/repo/WHAT/REV`, where what is `branch`, `preupload` or `commit`."""
        owner, repo_name, what, revision = path.split("/", 3)
        name = f"{owner}/{repo_name}"
        if what == "branch":
            repo = self.hub.repos[name]
            exists = repo.has(revision)
            if not exists:
                repo.branches[revision] = shutil.copytree(repo.folder, self.hub.new_folder(), dirs_exist_ok=True)
            self._send_json({}, 409 if exists else 200)
            return
        repo_there = self._repo_at(name, revision)
        if repo_there is None:
            return
        if what == "preupload":
            files = [self._mode(repo_there, item) for item in json.loads(body)["files"]]
            self._send_json({"files": files})
        elif what == "commit":
            self._commit(name, revision, repo_there, [json.loads(line) for line in body.splitlines()])
        else:
            self._send_error(404, "")

    def _mode(self, repo: Repo, item: dict[str, Any]) -> dict[str, Any]:
        is_large = item["path"].endswith((".safetensors", ".gguf", ".model"))
        there = repo.folder / item["path"]
        oid = None
        if there.is_file():
            oid = hashlib.sha256(there.read_bytes()).hexdigest() if is_large else blob_id(there)
        mode = {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        return {"path": item["path"], "oid": oid} | mode

    def _commit(self, name: str, revision: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repo.commit()):
            self._send_error(412, "", "A commit has happened since. Please refresh and try again.")
            return
        record: dict[str, Any] = {"repo": name, "revision": revision, "files": [], "deleted": [], "parent": parent}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                record["message"] = value["summary"]
            elif line["key"] == "deletedFile":
                (repo.folder / value["path"]).unlink()
                record["deleted"].append(value["path"])
            else:
                is_large = line["key"] == "lfsFile"
                data = self.hub.objects[value["oid"]] if is_large else base64.b64decode(value["content"])
                (repo.folder / value["path"]).write_bytes(data)
                record["files"].append(value["path"])
        record["commit"] = repo.commit()
        self.hub.commits.append(record)
        self._send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.commit()}", "commitOid": repo.commit()})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)
