"""A hub on this machine: one data set's or model's files, with ranges, and breaks on demand.

With kind "files" it is any server: the names of the files are their paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Of a file named in `cut` so many bytes are sent at a time; then the connection breaks."""

    def __init__(self, repository: str, files: Mapping[str, bytes], kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repository, self.files, self.kind = repository, dict(files), kind
        self.refs = {"main": COMMIT}  # branch → commit; every commit has the same files
        self.cut: dict[str, Iterator[int]] = {}
        self.stated: dict[str, int] = {}  # file → bytes that the list of files says
        self.ranges: list[tuple[str, str]] = []  # (file, Range) of every download
        self.tokens: dict[str, str | None] = {}  # file → Authorization of its last download
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        prefix = "" if self.server.kind == "models" else f"/{self.server.kind}"
        commits, api = self.server.refs, f"/api/{self.server.kind}/{self.server.repository}"
        if path.startswith(api):
            files = {n: len(x) for n, x in self.server.files.items()} | self.server.stated
            listed = [{"rfilename": name, "size": size} for name, size in files.items()]
            _, _, revision = path.partition("/revision/")
            commit = commits.get(revision or "main", revision)
            if commit not in commits.values():
                return self.send(b"", {"X-Error-Code": "RevisionNotFound"}, body, status=404)
            about: object = {"id": self.server.repository, "sha": commit, "siblings": listed}
            if path == f"{api}/refs":
                names = ("name", "ref", "targetCommit")
                pairs = [(name, f"refs/heads/{name}", commit) for name, commit in commits.items()]
                branches = [dict(zip(names, pair, strict=True)) for pair in pairs]
                about = {"branches": branches, "tags": [], "converts": []}
            if "/tree/" in path:
                about = [
                    {"type": "file", "path": name, "size": len(data), "oid": name}
                    for name, data in self.server.files.items()
                ]
            return self.send(json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
        if path.startswith(f"/api/{self.server.kind}/"):
            return self.send(b"", {"X-Error-Code": "RepoNotFound"}, body, status=404)
        resolved = f"{prefix}/{self.server.repository}/resolve/"
        commit, _, name = path.removeprefix(resolved).partition("/")
        known = path.startswith(resolved) and commit in commits.values()
        if self.server.kind == "files":  # not a hub
            commit, name, known = COMMIT, path.removeprefix("/"), True
        if not known or name not in self.server.files:
            return self.send(b"", {}, body, status=404)
        whole = self.server.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(whole)}"'}
        start, status = 0, 200
        wanted = self.headers.get("Range", "")
        if body:
            self.server.ranges.append((name, wanted))
            self.server.tokens[name] = self.headers.get("Authorization")
        if wanted:
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        cut = next(self.server.cut.get(name, iter(())), None) if body else None
        return self.send(whole[start:], headers, body, status, cut)

    def send(self, data: bytes, headers, body: bool, status: int = 200, cut: int | None = None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


def etag(data: bytes) -> str:
    """As the hub's: sha256 of what is stored apart, git's own sha1 of small files."""
    if len(data) > 5000:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextlib.contextmanager
def serving(repository: str, files: Mapping[str, bytes], kind: str = "datasets") -> Iterator[Hub]:
    """The hub while the block runs; kind: "datasets", "models" or "files"."""
    hub = Hub(repository, files, kind)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
