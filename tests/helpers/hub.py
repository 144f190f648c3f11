"""A model hub on this machine, as far as huggingface_hub asks one: model information, files, and commits without large-file storage.

with serve({"org/name": {"config.json": b"{}"}}, gated={"org/closed"}) as hub:   run(..., env=hub.environment(home))
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
OLD_COMMIT = "b" * 40


@dataclass
class Hub:
    """What it holds, and what it was asked and sent."""

    models: dict[str, dict[str, bytes]]
    gated: set[str]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})
    port: int = 0
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    created: dict[str, dict] = field(default_factory=dict)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process that is to find this hub, and nothing of the user's."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **settings, "HF_HUB_DISABLE_XET": "1", **more}


@contextmanager
def serve(models: Mapping[str, dict[str, bytes]], *, gated: set[str] = frozenset()) -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub(dict(models), set(gated))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = self._asked()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/tree/([^/]+))?", path):
            self._information(match[1], match[2] or match[3] or "main", tree=match[3] is not None)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        path, body = self._asked(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization"):
            self._answer(401, {"error": "no token"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.created[name] = asked
            self._answer(200, {"url": f"http://127.0.0.1:{self.hub.port}/{name}", "name": name, "id": name})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.hub.pushed[f"{match[1]}@{match[2]}"] = {f["path"]: base64.b64decode(f["content"]) for f in files}
            page = f"http://127.0.0.1:{self.hub.port}/{match[1]}/commit/{COMMIT}"
            self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": page, "hookOutput": ""})
        else:
            self._answer(200, {})

    def _asked(self) -> str:
        path = self.path.split("?")[0].replace("%2F", "/")
        self.hub.requests.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        return path

    def _information(self, name: str, revision: str, *, tree: bool) -> None:
        files = self.hub.models.get(name)
        commit = revision if revision in self.hub.revisions.values() else self.hub.revisions.get(revision)
        if files is None:
            self._answer(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        elif commit is None:
            self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        elif tree:
            self._answer(200, [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()])
        else:
            self._answer(
                200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files], "gated": name in self.hub.gated}
            )

    def _file(self, name: str, commit: str, path: str) -> None:
        if name in self.hub.gated:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        content = self.hub.models[name][path]
        self.send_response(200)
        for key, value in {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _answer(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
