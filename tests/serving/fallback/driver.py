"""Runs a whole session of the fallback engine behind a gateway: ``driver.py PLAN PORT``."""

from __future__ import annotations

import sys
from pathlib import Path

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.process.signals import StopSignal
from turbofit.gateway.config import GatewayConfig
from turbofit.serving.engine.engine_client import EngineClient, Timing
from turbofit.serving.engine.lmdeploy import Lmdeploy
from turbofit.serving.leases import Leases
from turbofit.serving.options import ServeConfig
from turbofit.serving.run import Run
from turbofit.serving.start import follow

ASKED = EngineClient.is_healthy


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def is_healthy(self: EngineClient, timeout: float) -> bool:
    """Say each answer of an engine that was asked how it is."""
    fine = ASKED(self, timeout)
    if fine:
        say("PULSE")
    return fine


EngineClient.is_healthy = is_healthy  # type: ignore[method-assign]
plan, port = Plan.from_json(Path(sys.argv[1]).read_bytes()), int(sys.argv[2])
config = ServeConfig(
    plan=plan,
    gateway=GatewayConfig(port=port, idle_seconds=0.3, retry_seconds=0.3),
    timing=Timing(liveness=0.3, backoff=0.1),
    port=port,
)
lmdeploy = Lmdeploy("none", ("never-run",))
try:
    with StopSignal() as stop, Leases() as leases:
        run = Run(config, leases, say, on_open=lambda _: say("OPEN"), lmdeploy=lmdeploy)
        run.plan = plan
        run.begin()
        say(f"ended {follow(run, stop).name}")
except TurbofitError as exc:
    say(f"error: {exc.message} | {exc.hint}")
    sys.exit(exc.exit_code)
