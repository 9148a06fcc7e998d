"""Stand-ins for Hugging Face's hub and ModelScope's, with tricks."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

COMMIT = "a" * 40
MODELSCOPE_API = "/api/v1/models/"


class _Answer(BaseHTTPRequestHandler):
    """Whole files and ranges of them."""

    protocol_version = "HTTP/1.1"
    server: _Site

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        kept = (self.headers.get(name) for name in (self.server.secret, "Range"))
        self.server.seen.append((self.path, *kept))
        self.server.answer(self)

    def give(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        for key, value in {"Content-Length": str(len(body)), **named}.items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = True
        self.wfile.write(body)

    def give_file(self, path: Path, **headers: str) -> None:
        if not path.is_file():
            return self.give(b"", 404)
        with path.open("rb") as file:
            data = file.read(1 << 20)
        size = path.stat().st_size
        wanted = self.headers.get("Range")
        if not wanted:
            return self.give(data, Content_Length=str(size), **headers)
        begin, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        body = data[begin : end + 1]
        span = f"bytes {begin}-{begin + len(body) - 1}/{size}"
        return self.give(body, 206, Content_Range=span, **headers)

    def redirect(self, to: str) -> None:
        self.give(b"", 302, Location=to)

    def drip(self, *, forever: bool = False) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(b"x" * (1 << 16) if forever else b"x")
                self.server.now += 0.0 if forever else 1.0
        except OSError:
            pass


class _Site(ThreadingHTTPServer):
    """A folder's repositories; ``seen`` has each path, what proved the caller, and its range."""

    secret = ""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.root = root
        self.trick = ""
        self.other: _Site | None = None
        self.now = 0.0
        self.seen: list[tuple[str, str | None, str | None]] = []

    def answer(self, request: _Answer) -> None:
        """One request's answer."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.server_close()


class Hub(_Site):
    """Hugging Face's: files by revision; ``trick`` is what else it does."""

    secret = "Authorization"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.revisions = {"main", COMMIT}

    def answer(self, request: _Answer) -> None:
        name, _, rest = request.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        path, weights = self.root / name / file, file.endswith(".safetensors")
        if self.trick in ("gated", "broken"):
            code, error = (401, "GatedRepo") if self.trick == "gated" else (500, "")
            request.give(b"", code, X_Error_Code=error)
        elif self.trick == "loop":
            request.redirect(request.path + "x")
        elif self.trick == "elsewhere" and weights:
            assert self.other is not None
            request.redirect(f"{self.other.url}{request.path}")
        elif self.trick == "scheme":
            request.redirect("file:///etc/passwd")
        elif revision not in self.revisions:
            request.give(b"", 404, X_Error_Code="RevisionNotFound")
        elif not path.is_file():
            there = (self.root / name).is_dir()
            request.give(b"", 404, X_Error_Code="EntryNotFound" if there else "RepoNotFound")
        elif self.trick == "endless" or (self.trick == "drip" and weights):
            request.drip(forever=self.trick == "endless")
        elif self.trick == "lies" and weights:
            request.give(b"\xff" * min(path.stat().st_size, 1 << 20), X_Repo_Commit=COMMIT)
        else:
            request.give_file(path, X_Repo_Commit=COMMIT)


class ModelScope(_Site):
    """ModelScope's: listings and files; weights are with ``other`` where there is one."""

    secret = "Cookie"

    def answer(self, request: _Answer) -> None:
        parts = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        name, _, verb = parts.path.removeprefix(MODELSCOPE_API).partition("/repo")
        folder, file = self.root / name, query.get("FilePath", "")
        if self.trick == "private":
            request.give(b"{}", 403)
        elif not parts.path.startswith(MODELSCOPE_API):
            request.give_file(self.root / parts.path.lstrip("/"))
        elif query.get("Revision") != "master" or not folder.is_dir():
            said = {"Code": 10010205001, "Message": "not found", "Success": False, "Data": None}
            request.give(json.dumps(said).encode(), 200 if self.trick == "says" else 404)
        elif verb == "/files":
            request.give(b"<html>" if self.trick == "html" else self._listing(folder))
        elif self.other is not None and file.endswith(".safetensors"):
            request.redirect(f"{self.other.url}/{name}/{file}")
        else:
            request.give_file(folder / file)

    def _listing(self, folder: Path) -> bytes:
        files = [
            {"Name": path.name, "Path": path.name, "Type": "blob", "Size": path.stat().st_size}
            for path in folder.iterdir()
        ]
        body = {"Code": 200, "Data": {"Files": files, "IsVisual": 0}, "Success": True}
        return json.dumps(body).encode()
