"""The gateway beside a supervisor."""

from __future__ import annotations

import gc
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("uvicorn")

from tests.support.gateway import plan_for
from tests.support.waiting import HANG
from turbofit.core.errors import LaunchError, UsageError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.accesslog import AccessLog
from turbofit.gateway.server import make_gateway
from turbofit.gateway.thread import GatewayThread


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is slow to end has not failed to."""
    monkeypatch.setattr("turbofit.gateway.thread._BEYOND", HANG)


def thread(log: AccessLog | None = None, **settings: object) -> GatewayThread:
    config = GatewayConfig(port=0, upstream_key="k", drain_seconds=1.0)
    config = msgspec.structs.replace(config, **settings)
    return GatewayThread(make_gateway(plan_for(), ["http://127.0.0.1:9"], config, log=log))


def health(url: str) -> tuple[int, dict[str, str], dict]:
    try:
        answer = urllib.request.urlopen(f"{url}/health", timeout=HANG)
    except urllib.error.HTTPError as exc:
        answer = exc
    with answer:
        headers = {k.lower(): v for k, v in answer.headers.items()}
        return answer.status, headers, json.loads(answer.read())


@pytest.mark.parametrize("pretend", [True, False])
def test_pretend_is_said_and_only_where_it_is_true(pretend: bool, tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    one = thread(log, pretend=pretend)
    one.start()
    try:
        status, headers, body = health(one.url)
        assert status == 503
        assert headers.get("x-turbofit-pretend") == ("1" if pretend else None)
        assert body.get("pretend") is (True if pretend else None)
    finally:
        one.stop()
    assert not one.alive
    (line,) = (tmp_path / "access.log").read_text().splitlines()
    assert json.loads(line)["status"] == 503
    log.close()


def test_without_a_drain_it_ends_at_once() -> None:
    one = thread(drain_seconds=100 * HANG)
    one.start()
    host, _, port = one.url.rpartition("//")[2].partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        one.stop(drain=False)
    assert not one.alive


def test_breaking_off_is_quiet_and_leaves_nothing_open(caplog, capfd) -> None:
    """A second Ctrl-C used to end with uvicorn's traceback and aiohttp's open sessions."""
    gc.collect()  # what other tests left
    caplog.clear()
    capfd.readouterr()
    one = thread(drain_seconds=100 * HANG)
    one.start()
    with suppress(urllib.error.HTTPError):  # 503: no engine; the gateway looked for one
        urllib.request.urlopen(f"{one.url}/metrics", timeout=HANG).read()
    one.stop(drain=False)
    assert not one.alive
    gc.collect()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_in_the_way_is_raised_where_it_was_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        one = thread(port=taken.getsockname()[1])
        with pytest.raises(LaunchError, match="cannot be bound"):
            one.start()
        one.stop(drain=False)
    nothing = str(tmp_path / "none.pem")
    with pytest.raises(UsageError, match="certificate"):
        thread(ssl_certfile=nothing, ssl_keyfile=nothing).start()


def test_one_that_never_started_stops() -> None:
    thread().stop()
    assert "gateway" not in {t.name for t in threading.enumerate()}


def test_it_is_told_of_engines_from_another_thread() -> None:
    one = thread()
    with pytest.raises(LaunchError, match="does not serve"):
        one.call(lambda gateway: gateway.engines)
    one.start()
    try:
        assert one.call(lambda gateway: len(gateway.fleet)) == 1
        assert one.call(lambda _: threading.current_thread().name) == "gateway"
        with pytest.raises(ZeroDivisionError):
            one.call(lambda _: 1 // 0)
        with pytest.raises(LaunchError, match="did not answer"):
            one.call(lambda _: one.call(lambda _: None, 0.0))
    finally:
        one.stop(drain=False)
    with pytest.raises(LaunchError, match="does not serve"):
        one.call(lambda gateway: gateway.engines)
