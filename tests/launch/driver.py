"""Runs `Server` in a process of its own: ``driver.py PLAN FOLDER PORT CHECK RUNNER…``."""

from __future__ import annotations

import sys
from pathlib import Path

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.launch.command import commands
from turbofit.launch.serve import Server


def say(text: str) -> None:
    """Progress, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    """Launch and follow."""
    plan = Plan.from_json(Path(sys.argv[1]).read_bytes())
    port, check = int(sys.argv[3]), sys.argv[4] == "check"
    server = Server(
        plan, commands(plan, port=port), sys.argv[5:], Path(sys.argv[2]), say, check=check
    )
    try:
        ended = server.run(lambda urls: say("READY " + " ".join(urls)))
    except TurbofitError as exc:
        say(f"error: {exc.message} | {exc.hint}")
        return exc.exit_code
    say(f"ended {ended.name}")
    return 0


sys.exit(main())
