"""LMDeploy's own HTTP server on pretend GPUs."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.rehearse.conftest import CARD, Rehearse
from tests.support.processes import free_port
from tests.support.waiting import HANG, until
from turbofit.pretend.scenario import PretendGpu, Scenario
from turbofit.pretend.timeline import read_timeline
from turbofit.rehearse.turbomind.server import NOTICE, main, server_environment


def get(port: int, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=json.dumps(data).encode() if data else None,
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=HANG) as answer:
        text = answer.read()
    return json.loads(text) if text else {}


def ask(port: int, width: int, height: int) -> dict[str, Any]:
    image = pytest.importorskip("PIL.Image")
    raw = io.BytesIO()
    image.new("RGB", (width, height)).save(raw, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(raw.getvalue()).decode()
    content = [
        {"type": "text", "text": "describe"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return get(
        port,
        "/v1/chat/completions",
        {
            "model": get(port, "/v1/models")["data"][0]["id"],
            "max_tokens": 4,
            "messages": [{"role": "user", "content": content}],
        },
    )


def healthy(port: int) -> bool:
    try:
        get(port, "/health")
    except (urllib.error.URLError, OSError):
        return False
    return True


@contextmanager
def serving(model: Path, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "turbofit.rehearse.turbomind.server", "serve", "api_server"]
    command += [str(model), "--server-name", "127.0.0.1", "--server-port", str(port)]
    command += ["--max-batch-size", "128", "--session-len", "32768"]
    env = server_environment(Scenario((msgspec.convert(CARD, PretendGpu),)), folder)
    with (folder / "stderr").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=log
        )
    try:
        until(lambda: process.poll() is not None or healthy(port), "the server to listen", HANG)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_a_photo_kills_the_real_server(
    run: Rehearse, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision")
    port = free_port()
    with serving(checkpoints("qwen2-vl-7b"), tmp_path, port) as process:
        assert process.poll() is None, (tmp_path / "stderr").read_text()[-2000:]
        small = ask(port, 1920, 1080)
        # 2691 tokens of the image, and the prompt's bytes
        assert 0 < small["usage"]["prompt_tokens"] - 2691 < 100
        assert small["usage"]["completion_tokens"] == 4
        with pytest.raises((urllib.error.URLError, OSError)):
            ask(port, 3584, 3584)
        assert process.wait(HANG) == -signal.SIGABRT
    text = (tmp_path / "stderr").read_text()
    assert NOTICE in text
    assert "CUDA error: out of memory" in text
    events = list(read_timeline(tmp_path / "timeline"))
    assert [e.fields[0] for e in events if e.tag == "P"][-2:] == ["ready", "serving"]
    assert sum(e.tag == "O" for e in events) == 1


def test_alone_it_says_how_it_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TURBOFIT_PRETEND_MACHINE", raising=False)
    assert main(["serve"]) == 2
    assert "turbofit serve --pretend" in capsys.readouterr().err
    assert "LD_PRELOAD" not in os.environ
