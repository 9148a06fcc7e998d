"""``turbofit serve --pretend`` in a process, and requests to it."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.open_clients import OpenClient
from tests.support.processes import HANG, Child, free_port
from turbofit.core.png import png

#: Tokens of an answer that goes on for minutes.
LONG: Final = 8000
MESSAGES: Final = [{"role": "user", "content": "x"}]


def needs(*modules: str) -> None:
    """Skips a file of tests where one of these cannot be imported."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}", allow_module_level=True)


def ask_at(url: str, path: str, body: Any = None, timeout: float = HANG, **headers: str) -> Any:
    """Status, headers and JSON of a server's answer."""
    connection = http.client.HTTPConnection(url.rpartition("/")[2], timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, data,
            {"Content-Type": "application/json", **headers},
        )  # fmt: skip
        answer = connection.getresponse()
        raw = answer.read()
        told = {k.lower(): v for k, v in answer.getheaders()}
        return answer.status, told, json.loads(raw) if raw else None
    finally:
        connection.close()


class Served:
    """A server on pretend GPUs."""

    def __init__(self, child: Child, port: int, state: Path) -> None:
        self.child, self.port, self.state = child, port, state

    @property
    def run(self) -> Path:
        """The only run's folder."""
        (folder,) = (self.state / "turbofit" / "runs").iterdir()
        return folder

    @property
    def record(self) -> Any:
        """The run's record."""
        return json.loads((self.run / "run.json").read_text())

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Wait until it serves."""
        assert self.child.process.stdout is not None
        self.child.wait_for("phase: ready")
        line = self.child.process.stdout.readline().strip()
        assert line.endswith(f":{self.port}"), (line, self.child.stderr)

    def ask(self, path: str, body: Any = None, **given: Any) -> Any:
        """Status, headers and JSON."""
        return ask_at(self.url, path, body, **given)

    def chat(self, *parts: dict[str, Any], **fields: Any) -> tuple[int, dict[str, str], Any]:
        """One chat request with these images, and these other fields."""
        name = self.ask("/v1/models")[2]["data"][0]["id"]
        content = [{"type": "text", "text": "What is it?"}, *parts]
        messages = [{"role": "user", "content": content}]
        body = {"model": name, "messages": messages, "max_tokens": 2, **fields}
        return self.ask("/v1/chat/completions", body)

    def streams(self, model: str) -> dict[str, OpenClient]:
        """A stream of each API, which would go on for minutes."""
        fields = {"model": model, "stream": True}
        bodies = {
            "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True},
            "/v1/messages": {"messages": MESSAGES, "max_tokens": LONG},
            "/v1/responses": {"input": "x", "max_output_tokens": LONG},
        }
        opened = {
            path: OpenClient(self.url, path, {**fields, **body}) for path, body in bodies.items()
        }
        for client in opened.values():
            client.wait_for(b"delta")
        return opened

    def clean(self, before: dict[Path, int] | None = None) -> None:
        """Assert that there is no traceback anywhere; in logs, behind what there was before."""
        logs = list((self.state / "turbofit" / "runs").glob("*/*.log*"))
        assert logs
        new = [log.read_bytes()[(before or {}).get(log, 0) :] for log in logs]
        for text in (self.child.stderr, *(part.decode(errors="replace") for part in new)):
            assert "Traceback" not in text, text
            assert "Exception" not in text, text


def told(path: str, client: OpenClient) -> bool:
    """Whether a stream ended with its API's own word for that."""
    status, _, body = client.answer()
    assert status == 200
    if path == "/v1/chat/completions":
        return b'"code":"ending"' in body and body.endswith(b"\n\ndata: [DONE]\n\n")
    return b"event: error\n" in body.rpartition(b"the server is stopping")[0][-200:]


def image(width: int, height: int, **fields: Any) -> dict[str, Any]:
    """An image part."""
    url = "data:image/png;base64," + base64.b64encode(png(width, height)).decode()
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def serve_pretend(
    children: list[Child], state: Path, *words: str, standby: bool = False, **environ: str
) -> Served:
    """Start it; the caller waits. A ``standby`` imports as much as an engine does."""
    port = free_port()
    more = () if standby else ("--no-standby",)
    if "--clock" not in words:  # a test waits for events, and for no forecast
        more += ("--clock", "0")
    child = start_turbofit(
        children, state, "serve", "--pretend", "--port", str(port), *more, *words, **environ
    )
    return Served(child, port, state)


def start_turbofit(children: list[Child], state: Path, *words: str, **environ: str) -> Child:
    """Start a command of turbofit with a state folder and leases of its own."""
    child = Child(
        [sys.executable, "-m", "turbofit", *words], standin=False, XDG_STATE_HOME=str(state),
        TURBOFIT_LEASES=str(state / "leases"), **environ,
    )  # fmt: skip
    children.append(child)
    return child
