"""A stand-in for the Hugging Face Hub on loopback: enough of it for huggingface_hub's downloads.

    with FakeHub() as hub:
        hub.add("apple/OpenELM-270M", folder)
        hub.url         # for HF_ENDPOINT
        hub.requests    # [("GET", "/apple/OpenELM-270M/resolve/<commit>/config.json"), ...]

Repositories are served from local folders, read at each request. Whatever is not asked for below is a 404.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A served folder. `refs` are the branches and tags; the commit is a hash of the content."""

    folder: Path
    refs: set[str] = field(default_factory=lambda: {"main"})
    gated: int | None = None  # the status that answers requests for files: 401 without a token, 403 with one
    broken: str | None = None  # the file whose transfers break off half-way, every time

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def commit(self) -> str:
        content = hashlib.sha1()
        for name in self.files():
            content.update(name.encode() + blob_id(self.folder / name).encode())
        return content.hexdigest()

    def has(self, revision: str) -> bool:
        return revision in self.refs or revision == self.commit()


def blob_id(path: Path) -> str:
    """The id git gives a file's content, which the hub uses as the ETag of small files."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The server. Attributes may be changed while it runs.

    `status` answers everything with that status (500, 503, 429); `rejects_token` answers as to a wrong token.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None
        self.rejects_token = False
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
        """The names of the files whose content was asked for, in order."""
        return [path.split("/", 5)[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def add(self, name: str, folder: Path, **switches: object) -> Repo:
        self.repos[name] = Repo(Path(folder), **switches)  # type: ignore[arg-type]
        return self.repos[name]

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


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
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
        elif path.startswith("/api/models/"):
            self._answer_api(path.removeprefix("/api/models/"))
        else:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._answer_file(name, revision, file)

    def _answer_api(self, path: str) -> None:
        """`owner/repo`, `owner/repo/revision/REV` or `owner/repo/tree/REV`."""
        parts = path.split("/", 3)
        name, what, revision = "/".join(parts[:2]), parts[2:3], "/".join(parts[3:]) or "main"
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
            self._send_json({"id": name, "modelId": name, "sha": repo.commit(), "siblings": siblings, "tags": []})

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
        return repo

    def _send_file(self, repo: Repo, file: str) -> None:
        data = (repo.folder / file).read_bytes()
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", repo.commit())
        self.send_header("ETag", f'"{blob_id(repo.folder / file)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            # A client that resumes gets nothing more: the break is at the same byte each time.
            end = len(data) // 2 if repo.broken == file else len(data)
            self.wfile.write(data[start:end])

    def _send_json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _send_error(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
