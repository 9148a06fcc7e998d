"""Runs `Supervisor` in a process of its own: ``PLAN FOLDER PORT CHECK TIMING RUNNER…``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.process.signals import StopSignal
from turbofit.planning.commands import commands
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.supervised_engine import Supervision
from turbofit.serving.engine.worst_requests import ask_worst
from turbofit.serving.supervisor import Supervisor


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


plan_file, folder, port, check, timing, *runner = sys.argv[1:]
plan = Plan.from_json(Path(plan_file).read_bytes())
launches = [
    Launch(command, runner, group=group)
    for group, command in enumerate(commands(plan, port=int(port)))
]
supervision = Supervision(
    say, ask_worst if check == "check" else None,
    Timing(**{"liveness": 0.0, **json.loads(timing)}),
)  # fmt: skip
server = Supervisor(plan, launches, Path(folder), supervision)
try:
    with StopSignal() as stop:
        ended = server.run(stop, lambda urls: say("READY " + " ".join(urls)))
except (EndedError, TurbofitError) as exc:
    error = exc.end.error if isinstance(exc, EndedError) else exc
    say(f"error: {error.message} | {error.hint}")
    sys.exit(error.exit_code)
say(f"ended {ended.name}")
