"""A small hub of data sets on this machine: the requests of `datasets.load_dataset`, answered from a folder."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    root: Path
    """A folder ``<owner>/<name>`` for each data set."""

    def log_message(self, *args: Any) -> None: ...

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def look_up(self) -> None:
        kind, *parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if kind == "api":  # api/datasets/<owner>/<name>/…
            name, rest = "/".join(parts[1:3]), parts[3:]
        else:  # datasets/<owner>/<name>/resolve/<commit>/<file>
            name, rest = "/".join(parts[:2]), ["resolve", *parts[4:]]
        repo = self.root / name
        if kind not in ("", "api", "datasets") or not repo.is_dir():
            self.answer(404, X_Error_Code="RepoNotFound")
        elif kind == "":
            self.answer(200)
        elif rest[:1] == ["resolve"]:
            self.resolve(repo.joinpath(*rest[1:]))
        elif rest[:1] == ["tree"]:
            self.tree(repo, repo.joinpath(*rest[2:]))
        else:
            files = [{"rfilename": file.name} for file in repo.iterdir()]
            info = {"_id": "1", "id": name, "sha": COMMIT, "siblings": files, "private": False, "gated": False}
            self.answer(200, info | {"disabled": False, "tags": [], "downloads": 0, "likes": 0})

    def resolve(self, file: Path) -> None:
        if not file.is_file():
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, file.read_bytes(), ETag=f'"{_digest(file)}"', X_Repo_Commit=COMMIT)

    def tree(self, repo: Path, folder: Path) -> None:
        if not folder.is_dir():
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, [_entry(repo, file) for file in sorted(folder.iterdir())])

    do_GET = do_HEAD = look_up


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(repo: Path, file: Path) -> dict[str, Any]:
    name = str(file.relative_to(repo))
    if file.is_dir():
        return {"type": "directory", "oid": "1", "size": 0, "path": name}
    return {"type": "file", "oid": _digest(file), "size": file.stat().st_size, "path": name}


def dataset_hub(root: Path) -> ThreadingHTTPServer:
    """A server for the data sets in a folder; its address is ``http://127.0.0.1:<server_port>``."""
    return ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"root": root}))
