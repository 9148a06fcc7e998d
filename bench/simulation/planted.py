"""``python -m bench.simulation.planted``: does the simulation find bugs in a copy of turbofit?

Each bug is one small change of the simulated code, and must be found. The simulation does not check
that an answer clears a suspect, as a suspect that is not cleared only waits its turn: the test is
`test_all_that_an_engine_had_are_suspected_until_they_are_answered`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

_REPO = Path(__file__).parents[2]
_FOUND = re.compile(r"^seed (\d+): (.*)", re.MULTILINE)


class Bug(NamedTuple):
    """A planted bug: ``old``, which is once in ``file``, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str


_ADMISSION, _FORWARDER = "gateway/routing/admission.py", "gateway/routing/request_forwarder.py"
_HEALTH = "gateway/routing/health.py"
_DENY_LIST = "gateway/routing/deny_list.py"
_SUPERVISOR, _ENGINE = "serving/supervisor.py", "serving/engine/supervised_engine.py"
_START, _LEASES = "serving/start.py", "serving/leases.py"
BUGS = (
    # Clients that are let in, and requests that engines hold.
    Bug("units are never given back", _ADMISSION,
        "        self.engine.gate.end(self._share)\n", ""),
    Bug("units are not taken", "gateway/limits/gate.py",
        "        self._until_begun += share.cost.units\n", ""),
    Bug("room is given back twice", _ADMISSION,
        "        self.engine.host_bytes -= self._host_bytes\n        self._host_bytes = 0\n",
        "        self.engine.host_bytes -= self._host_bytes\n"),
    Bug("room is kept where an engine breaks off", _FORWARDER,
        "        self._place.leave(LEFT_SECONDS if may_go_on else 0.0, left=left)\n", ""),
    Bug("outstanding requests are never taken off", _FORWARDER,
        "            engine.outstanding -= 1\n", ""),
    Bug("a broken stream ends without an error", _FORWARDER,
        "        event = refusal_event(self._route.api, refusal)\n",
        "        return\n        event = refusal_event(self._route.api, refusal)\n"),
    Bug("an engine that answers again stays out", _HEALTH, "            engine.up = True\n", ""),
    Bug("an engine that hangs is left", "serving/engine/supervised_engine.py",
        'return "hung"', 'return "works"'),
    Bug("an engine's page is waited for without end", "gateway/upstream.py",
        "await asyncio.wait_for(self._page(engine, path), seconds)",
        "await self._page(engine, path)"),
    # Who is suspected, and who is refused.
    Bug("nobody is suspected", _DENY_LIST,
        "        self._deaths.append(death)\n", ""),
    Bug("who is refused is let through", _DENY_LIST,
        "        if in_turn >= _REFUSED:\n            minutes",
        "        if False:\n            minutes"),
    Bug("suspects run together", _ADMISSION,
        "        if self.turn is not None:\n            engine.turns[self] = self.turn\n", ""),
    Bug("an engine that somebody killed accuses its requests", _START,
        'end.kind == "killed" or any_lost(uuids)', "any_lost(uuids)"),
    Bug("the next gateway knows no suspect", _START, ", deny_list=run.deny_list,", ","),
    Bug("a death is noted once", "gateway/routing/engines.py",
        "self.death is None or max(self.last_success, sent_at - _PAUSE) > self.died_at",
        "self.death is None"),
    # Supervisor, leases, disk, cards.
    Bug("an engine that waits is not started", _SUPERVISOR,
        "if now >= engine.again_at and", "if now >= engine.again_at + 1e9 and"),
    Bug("an engine that takes no signal is left", _SUPERVISOR,
        "        self._kill_groups()\n        deadline = time.monotonic() + _LAST_SECONDS\n"
        "        for engine, _ in running:\n"
        "            self._end(engine, max(0.5, deadline - time.monotonic()))\n", ""),
    Bug("a broken circuit never closes", _ENGINE,
        'self.again_at = now + timing.window', 'self.again_at = now + 1e9'),
    Bug("a hung engine is never given up", "serving/engine/engine_client.py",
        "            if failures >= _LIVENESS_FAILURES:", "            if failures >= 10**9:"),
    Bug("an ended engine's lease counts as settled", _LEASES,
        "        return all(start_time(pid) == began for pid, began in self.engines)\n",
        "        return self.ready\n"),
    Bug("what dead turbofits left behind goes on", "serving/planner.py",
        "        for text in end_orphans(self.leases):\n", "        for text in ():\n"),
    Bug("a plan is not reserved", "serving/planner.py",
        "                self.leases.reserve(plan)\n        return plan\n",
        "                pass\n        return plan\n"),
    Bug("a lease is left at the end", _LEASES,
        'for file in (lease, lease.with_suffix(".lock")):', "for file in ():"),
    Bug("a record is written in place", "core/process/files.py",
        "    descriptor, temporary = open_beside(target) if mode is None",
        "    target.write_bytes(raw)\n    return\n"
        "    descriptor, temporary = open_beside(target) if mode is None"),
    Bug("the gateway is left open under another plan", _START,
        "                self._run.public.stop(drain=not urgent)\n", "                pass\n"),
    Bug("an error of the driver ends the watch", "serving/gpu_monitor.py",
        "    except TurbofitError as exc:\n        return None, exc.message\n"
        "    except Exception as exc:  # noqa: BLE001 - the engines serve in spite of any error\n",
        "    except ZeroDivisionError as exc:\n"),
)  # fmt: skip


def main() -> int:
    """Plant each bug, simulate, and print a table; returns 1 if a bug was not found."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulation.planted", description=__doc__)
    parser.add_argument("--days", type=int, default=300, help="simulated days for each, at most")
    parser.add_argument("--only", default="", help="bugs whose name has this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    missed = 0
    print("| bug | in | first seed | what showed it | s |\n|---|---|---|---|---|")
    for bug in [bug for bug in BUGS if given.only in bug.name]:
        seed, what, seconds = tried(bug, range(given.days), given.workers)
        missed += seed is None
        text = what[:150].replace("|", "/")
        print(f"| {bug.name} | `{bug.file}` | {seed} | {text} | {seconds:.0f} |", flush=True)
    return int(missed > 0)


def planted(bug: Bug, folder: Path) -> None:
    """Write a copy of turbofit and its benches with one bug.

    Raises:
        ValueError: the code to change is not in the file exactly once.
    """
    for name in ("turbofit", "bench", "presets", "tests/support"):
        if (_REPO / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_REPO / name, folder / name, ignore=skipped)
    (folder / "tests" / "__init__.py").touch()
    path = folder / "turbofit" / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.file} has {text.count(bug.old)} places for {bug.name!r}, not one")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def tried(bug: Bug, seeds: range, workers: int) -> tuple[int | None, str, float]:
    """Return the first seed that finds a bug, the violation, and the seconds that it took.

    Raises:
        RuntimeError: the days could not be run.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="turbofit-planted-") as name:
        folder = Path(name)
        planted(bug, folder)
        argv = [sys.executable, "-m", "bench.simulation.run", "--first", str(seeds.start),
                "--days", str(len(seeds)), "--workers", str(workers),
                "--first-violation"]  # fmt: skip
        done = subprocess.run(
            argv, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    match = _FOUND.search(done.stdout)
    if " simulated " not in done.stdout:
        raise RuntimeError(done.stderr[-2000:])
    found = (int(match[1]), match[2]) if match else (None, "")
    return *found, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
