"""The gateway before LMDeploy's PyTorch engine on a pretend GPU, which dies behind a healthy page.

After an out-of-memory that engine answers every request with 503 for ever, and its page with 200.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from tests.pretend.cuda_torch import CUDA_PATH, ROOT
from tests.support.gateway import CHAT, PATCHES, plan_for
from tests.support.processes import free_port
from tests.waiting import HANG, until
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.server import make_gateway
from turbofit.gateway.thread import GatewayThread
from turbofit.launch.engine.image import flat_png
from turbofit.rehearse.checkpoint.twin import write_checkpoint

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.slow,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]


class Server:
    """LMDeploy's own server with its PyTorch engine."""

    def __init__(self, folder: Path, ratio: float) -> None:
        model = write_checkpoint("qwen2-vl-2b", folder / "Qwen2-VL-2B-Instruct")
        self.port = free_port()
        words = [
            "serve", "api_server", str(model), "--backend", "pytorch", "--eager-mode",
            "--cache-max-entry-count", str(ratio), "--max-batch-size", "8",
            "--server-port", str(self.port), "--model-name", "m",
        ]  # fmt: skip
        code = (
            "import sys; from lmdeploy.cli.entrypoint import run; sys.argv[0] = 'lmdeploy'; run()"
        )
        environ = {**os.environ, "PYTHONPATH": f"{CUDA_PATH}:{ROOT}", "HF_HUB_OFFLINE": "1"}
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "turbofit", "pretend", "--on", "1xrtx3090", "--json", "--",
             sys.executable, "-c", code, *words],
            env={**environ, "LMDEPLOY_ENABLE_CHECK_ENV": "0"}, cwd=folder,
            stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def starts(self) -> bool:
        """Wait until its page is healthy; False if its two processes lost each other before."""
        until(self._settled, "LMDeploy to serve", 5 * HANG)
        if self.process.poll() is None:
            return True
        log = Path(self.log.name).read_text()
        assert "EOFError" in log, log[-3000:]
        return False

    def _settled(self) -> bool:
        if self.process.poll() is not None:
            return True
        with suppress(OSError, http.client.HTTPException):
            return ask(self.port, "/health")[0] == 200
        return False

    def end(self) -> dict[str, Any]:
        """End it; turbofit's report.

        LMDeploy is killed: asked to end, the page can wait for its dead engine for ever. Turbofit
        ends the engine's process then.
        """
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        report: dict[str, Any] = json.loads(self.process.communicate(timeout=HANG)[0])
        self.log.close()
        return report


def ask(port: int, path: str, body: Any = None, timeout: float = 5 * HANG) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"}
        connection.request("GET" if body is None else "POST", path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def chat(side: int | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "what?"}]
    if side:
        url = "data:image/png;base64," + b64encode(flat_png(side, side)).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 2}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One that answers: now and then LMDeploy's two processes lose each other at the start, and it
    ends, or nothing but its page is answered. `serve` starts it again, and so does this."""
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        one = Server(tmp_path / str(number), 0.95)
        try:
            if one.starts() and ask(one.port, CHAT, chat())[0] == 200:
                yield one
                return
        finally:
            if one.process.poll() is None:
                one.end()
    pytest.fail("LMDeploy's processes lost each other at five starts")


def test_it_lives_while_clients_keep_to_the_plan_and_its_death_is_seen(server: Server) -> None:
    config = GatewayConfig(port=0, idle_seconds=1.0, retry_seconds=0.5, probe_seconds=HANG)
    plan = plan_for(PATCHES, limit=602112, images=1)
    url = f"http://127.0.0.1:{server.port}"
    with GatewayThread(make_gateway(plan, [url], config, overlay=False)) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        # Lowered to the plan: the same photo lives.
        status, body = ask(port, CHAT, chat(3584))
        assert status == 200, body
        assert json.loads(body)["usage"]["prompt_tokens"] < 602112 // 784 + 300
        assert ask(port, "/health")[0] == 200
        # Past the gateway it is too much; from then on nothing is answered.
        # LMDeploy's own page says so some time later.
        assert ask(server.port, CHAT, chat(3584))[0] != 200
        assert ask(server.port, CHAT, chat())[0] == 503
        until(lambda: ask(port, "/health")[0] == 503, "the gateway to see it")
        status, _ = ask(port, CHAT, chat())
        assert status == 503
    report = server.end()
    refused = report["refused"]
    assert refused["asked"] > refused["left"]
    assert "qwen2_vl.py" in refused["site"]
