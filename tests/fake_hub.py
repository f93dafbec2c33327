"""A small Hugging Face hub on this machine: the few requests that publishing and downloading an adapter need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_of_the_test"
COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/(\w+)")
PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/(\w+)")
INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """The content of the hub, and what it shall answer.

    Attributes:
        repos: files by name, by repository.
        private: whether each repository is private.
        commits: how many commits each repository got.
        fail: a status to answer with, by the first word that the request's path has to contain.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, int] = {}
        self.fail: dict[str, int] = {}
        self.asked: list[str] = []
        self.url = ""

    def sha(self, name: str) -> str:
        content = b"".join(key.encode() + value for key, value in sorted(self.repos[name].items()))
        return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        for word, status in self.hub.fail.items():
            if word in path:
                self.answer(status, {"error": "as the test wants it"})
                return
        needs_token = path == "/api/whoami-v2" or (path.startswith("/api/") and self.command == "POST")
        if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/":
            self.answer(200)
        elif path == "/api/whoami-v2":
            self.answer(200, {"name": "somebody", "type": "user", "orgs": [], "auth": {}})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif PREUPLOAD.fullmatch(path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer(200, {"files": modes})
        elif found := COMMIT.fullmatch(path):
            self.commit(found[1], body)
        else:
            self.read(path)

    do_GET = do_POST = do_HEAD = handle_any

    def create(self, given: dict[str, Any]) -> None:
        name = f"{given.get('organization') or 'somebody'}/{given['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": url})
        else:
            self.hub.repos[name], self.hub.private[name] = {}, given.get("visibility") == "private"
            self.answer(200, {"url": url})

    def commit(self, name: str, body: bytes) -> None:
        files = dict(self.hub.repos[name])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self.hub.repos[name] = files
        self.hub.commits[name] = self.hub.commits.get(name, 0) + 1
        url = f"{self.hub.url}/{name}/commit/{self.hub.sha(name)}"
        self.answer(200, {"commitUrl": url, "commitOid": self.hub.sha(name), "success": True})

    def read(self, path: str) -> None:
        found = TREE.fullmatch(path) or INFO.fullmatch(path) or FILE.fullmatch(path)
        name = found[1] if found else ""
        if found is None or name not in self.hub.repos:
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.answer(404 if found is None or not path.startswith("/api") else 401, None, missing)
        elif found[2] not in (None, "main", self.hub.sha(name)):
            self.answer(404, None, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev"})
        else:
            self.read_from(name, path, found)

    def read_from(self, name: str, path: str, found: re.Match[str]) -> None:
        files, sha = self.hub.repos[name], self.hub.sha(name)
        if TREE.fullmatch(path):
            rows = [{"type": "file", "path": k, "size": len(v), "oid": _oid(v)} for k, v in files.items()]
            self.answer(200, rows, {"Content-Type": "application/json"})
        elif INFO.fullmatch(path):
            siblings = [{"rfilename": key, "size": len(value)} for key, value in files.items()]
            info = {
                "id": name,
                "modelId": name,
                "sha": sha,
                "siblings": siblings,
                "private": self.hub.private.get(name, False),
                "tags": [],
            }
            self.answer(200, info | {"downloads": 0, "likes": 0})
        elif (content := files.get(found[3])) is None:
            self.answer(404, None, {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha})


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Any, token: str | None = TOKEN) -> Iterator[Hub]:
    """The hub, as the only one that huggingface_hub knows, with an empty local cache."""
    import huggingface_hub
    from huggingface_hub import constants

    from diffora.hub import why_unreachable

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    huggingface_hub.close_session()
    why_unreachable.cache_clear()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        why_unreachable.cache_clear()
        huggingface_hub.close_session()
