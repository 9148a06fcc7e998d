"""The gateway beside the supervisor."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("uvicorn")

from tests.fixtures.plans import plausible_plan
from turbofit.core.errors import LaunchError
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.front import AccessLog, Front


def front(port: int, *, pretend: bool, log: AccessLog | None = None) -> Front:
    config = GatewayConfig(port=port, upstream_key="k", drain_seconds=1.0)
    return Front(
        plausible_plan(gpus=1, tp=1), ["http://127.0.0.1:9"], config,
        overlay=True, pretend=pretend, log=log,
    )  # fmt: skip


def health(port: int) -> tuple[int, dict[str, str], dict]:
    try:
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
    except urllib.error.HTTPError as exc:
        answer = exc
    with answer:
        headers = {k.lower(): v for k, v in answer.headers.items()}
        return answer.status, headers, json.loads(answer.read())


@pytest.mark.parametrize("pretend", [True, False])
def test_pretend_is_said_and_only_where_it_is_true(
    pretend: bool, port: int, tmp_path: Path
) -> None:
    log = AccessLog(tmp_path / "access.log")
    one = front(port, pretend=pretend, log=log)
    one.start()
    try:
        assert one.url == f"http://127.0.0.1:{port}"
        status, headers, body = health(port)
        assert status == 503
        assert headers.get("x-turbofit-pretend") == ("1" if pretend else None)
        assert body.get("pretend") is (True if pretend else None)
    finally:
        one.stop(drain=True)
    assert not one.alive
    (line,) = (tmp_path / "access.log").read_text().splitlines()
    assert json.loads(line)["status"] == 503
    log.close()
    log({"after": "the end"})


def test_a_port_that_is_taken(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        one = front(port, pretend=False)
        with pytest.raises(LaunchError, match="cannot be bound"):
            one.start()
        one.stop(drain=False)


def test_the_access_log_begins_anew(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log", cap=200)
    for number in range(50):
        log({"number": number})
    kept = (tmp_path / "access.log").read_text() + (tmp_path / "access.log.1").read_text()
    assert '"number": 49' in kept
    assert len(kept) <= 400
