"""As much of W&B's server as a run needs, on a local port: what arrives is kept to look at.

`wandb sync` and online runs are then the real ones, wandb's own service reading and sending; only
the far end is ours.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Arrived:
    """What reached the server, by the runs' identities; `files`: contents by path.

    begun: a run's identity each time that it was begun. finished: exit codes. breaking: runs may
    begin, but nothing that they hold is taken.
    """

    url: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    breaking: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}

    def sync(self, *folders: Path) -> None:
        """`wandb sync`: its own reader of the runs' files, in a process of its own."""
        command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
        env = os.environ | self.environment
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)

    def file(self, end: str) -> bytes:
        """The content of the one file whose path ends so."""
        (found,) = {data for path, data in self.files.items() if path.endswith(end)}
        return found

    def table(self, run: str, name: str) -> dict[str, Any]:
        return json.loads(self.file(f"{run}-{name}/{name}.table.json"))

    def summary(self, run: str) -> dict[str, Any]:
        return json.loads(self.lines[run]["wandb-summary.json"][-1])

    def config(self, run: str) -> dict[str, Any]:
        entries = json.loads(self.runs[run]["config"])
        return {name: entry["value"] for name, entry in entries.items() if name != "_wandb"}


@contextlib.contextmanager
def serve() -> Iterator[Arrived]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.arrived = Arrived(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.arrived
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    arrived: Arrived

    def handle_error(self, *given: Any) -> None:
        """A client that hangs up is nothing to report."""


def _reply(arrived: Arrived, query: str, given: dict[str, Any]) -> dict[str, Any]:
    """Answers by what is asked for; a server without features."""
    if "upsertBucket(" in query:
        run, entity = given["name"], {"id": "E", "name": "somebody"}
        if given.get("groupName"):
            arrived.begun.append(run)
        told = {name: value for name, value in given.items() if value is not None}
        arrived.runs[run] = arrived.runs.get(run, {}) | told
        bucket = {"id": run, "name": run, "displayName": given.get("displayName")}
        bucket |= {"project": {"id": "P", "name": "loraq", "entity": entity}, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "createArtifact(" in query:
        made = {"id": given["input"]["artifactCollectionName"], "state": "PENDING"}
        return {"createArtifact": {"artifact": made | {"artifactSequence": None}}}
    if "createArtifactManifest(" in query:
        manifest = {"id": "M", "file": _upload(arrived, given["artifactID"], "manifest.json")}
        return {"createArtifactManifest": {"artifactManifest": manifest}}
    if "createArtifactFiles(" in query:
        asked = given["input"]["artifactFiles"]
        nodes = [_upload(arrived, one["artifactID"], one["name"]) for one in asked]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
    if "commitArtifact(" in query:
        return {"commitArtifact": {"artifact": {"id": "A", "digest": "d"}}}
    if "createRunFiles(" in query:
        url = f"{arrived.url}/put/{given['run']}"
        files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
    if "artifact(name" in query:
        return {"project": {"artifact": None}}
    if "viewer" in query:
        viewer = {"id": "V", "entity": "somebody", "username": "somebody", "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}}, "serverInfo": _SERVER}
    return {"serverInfo": _SERVER}


_SERVER = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}


def _upload(arrived: Arrived, artifact: str, name: str) -> dict[str, Any]:
    url = f"{arrived.url}/put/{artifact}/{name}"
    return {"id": "F", "uploadUrl": url, "uploadHeaders": [], "artifact": {"id": artifact}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    server: _Server

    def log_message(self, *given: Any) -> None:
        """Nothing on the console."""

    def do_POST(self) -> None:
        arrived, body = self.server.arrived, self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._answer({"data": _reply(arrived, asked["query"], asked.get("variables") or {})})
            return
        run, told = self.path.split("/")[-2], json.loads(body or b"{}")
        for name, chunk in (told.get("files") or {}).items():
            lines = arrived.lines.setdefault(run, {}).setdefault(name, [])
            lines[chunk["offset"] :] = chunk["content"]
        if told.get("complete"):
            arrived.finished[run] = told["exitcode"]
        self._answer({})

    def do_PUT(self) -> None:
        self.server.arrived.files[self.path.removeprefix("/put/")] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        broken = self.server.arrived.breaking and self.path != "/graphql"
        self.send_response(500 if broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
