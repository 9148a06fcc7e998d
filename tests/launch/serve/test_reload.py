"""SIGHUP: keys, origins and media domains change at once; all else is told, and waits."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("uvicorn")

from tests.support.gateway import plan_for
from tests.support.waiting import HANG, until
from turbofit.core.errors import UsageError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.server import GatewayThread, make_gateway
from turbofit.launch.run import Reloader
from turbofit.launch.serve.config import ServeConfig
from turbofit.launch.serve.supervisor import StopSignal

OPTIONS = {"api_key": ("one",), "context": "4096", "port": 0}


def public(*keys: str) -> GatewayConfig:
    return GatewayConfig(port=0, api_keys=keys, drain_seconds=1.0)


@pytest.fixture
def job() -> Iterator[Any]:
    config = public("one")
    with GatewayThread(make_gateway(plan_for(), ["http://127.0.0.1:9"], config)) as front:
        said: list[str] = []
        yield SimpleNamespace(
            config=ServeConfig(gateway=config), public=front, say=said.append, said=said
        )


def status(job: Any, key: str) -> int:
    """What a request with this key gets; no engine runs behind the gateway."""
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{job.public.url}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code


def test_a_key_changes_at_once_and_in_later_starts(job):
    assert (status(job, "one") == 401, status(job, "two") == 401) == (False, True)
    options = {**OPTIONS, "api_key": ("two",), "context": "8192"}
    Reloader(job, OPTIONS, lambda: (options, public("two"))).reload()
    assert (status(job, "one") == 401, status(job, "two") == 401) == (True, False)
    assert job.said == ["needs a restart: context", "reloaded: api_key"]
    assert job.config.gateway.api_keys == ("two",)


def test_what_needs_a_restart_is_said_each_time(job):
    options = {**OPTIONS, "port": 8000}
    reloader = Reloader(job, OPTIONS, lambda: (options, public("one")))
    reloader.reload()
    reloader.reload()
    assert job.said == ["needs a restart: port", "reloaded: nothing"] * 2
    assert job.config.gateway.port == 0


def test_a_wrong_profile_changes_nothing(job):
    def wrong() -> Any:
        raise UsageError("turbofit.yaml:3: contxt is nothing", hint="did you mean context?")

    Reloader(job, OPTIONS, wrong).reload()
    assert job.said == ["not reloaded: turbofit.yaml:3: contxt is nothing (did you mean context?)"]
    assert status(job, "one") != 401


def test_the_hangup_reloads_and_does_not_end_the_run(job):
    options = {**OPTIONS, "api_key": ("two",)}
    with StopSignal() as stop:
        stop.on_hangup = Reloader(job, OPTIONS, lambda: (options, public("two"))).begin
        signal.raise_signal(signal.SIGHUP)
        until(lambda: job.said == ["reloaded: api_key"], "the reload")
        assert stop.signal is None
    assert status(job, "two") != 401


def test_a_terminal_that_closes_ends_the_run(monkeypatch):
    open_terminals = {0, 2}
    monkeypatch.setattr("os.isatty", lambda fd: fd in open_terminals)
    heard: list[str] = []
    with StopSignal() as stop:
        stop.abrupt = False
        stop.on_hangup = lambda: heard.append("reload")
        signal.raise_signal(signal.SIGHUP)
        assert (heard, stop.signal) == (["reload"], None)
        open_terminals.clear()
        signal.raise_signal(signal.SIGHUP)
        assert (heard, stop.signal) == (["reload"], signal.SIGHUP)
