"""Runs `Supervisor` in a process of its own: ``PLAN FOLDER PORT CHECK TIMING RUNNER…``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.launch.engine.engine_client import Timing
from turbofit.launch.engine.engine_log import EndedError
from turbofit.launch.engine.launches import Launch
from turbofit.launch.serve.supervisor import StopSignal, Supervisor
from turbofit.planning.commands import commands


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def tell_open(server: Supervisor, urls: list[str]) -> None:
    server.tell_open()
    say("READY " + " ".join(urls))


def main() -> int:
    plan = Plan.from_json(Path(sys.argv[1]).read_bytes())
    port, check = int(sys.argv[3]), sys.argv[4] == "check"
    timing = Timing(**{"liveness": 0.0, **json.loads(sys.argv[5])})
    launches = [Launch(command, sys.argv[6:]) for command in commands(plan, port=port)]
    server = Supervisor(plan, launches, Path(sys.argv[2]), say, check=check, timing=timing)
    try:
        with StopSignal() as stop:
            ended = server.run(stop, lambda urls: tell_open(server, urls))
    except EndedError as exc:
        error = exc.end.error
        say(f"error: {error.message} | {error.hint}")
        return error.exit_code
    except TurbofitError as exc:
        say(f"error: {exc.message} | {exc.hint}")
        return exc.exit_code
    say(f"ended {ended.name}")
    return 0


sys.exit(main())
