"""``python -m bench.simulation.planted``: bugs put into a copy of turbofit, and whether they show.

Each is one small change of the code that is simulated; the simulation must find it.
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
    """``old`` stands once in ``file``, and becomes ``new``; ``seed`` is of a day that shows it.

    Those with a seed are rare; most of them were bugs of turbofit before they were mended.
    """

    name: str
    file: str
    old: str
    new: str
    seed: int | None = None


BUGS = (
    Bug("units are never given back", "gateway/routing/admission.py",
        "            engine.units -= cost.units\n", "            pass\n"),
    Bug("units are not taken", "gateway/limits/gate.py",
        "        self.counted += held.units\n", ""),
    Bug("what may be evicted is forgotten", "gateway/limits/gate.py",
        "(self._all if over else self.counted)", "self.counted"),
    Bug("who left is forgotten at once", "gateway/quarantine/identity.py",
        "LEFT_SECONDS: Final = 10.0", "LEFT_SECONDS: Final = 0.0"),
    Bug("equal requests go to all engines at once", "gateway/routing/equal_requests.py",
        "            first = self._first(sketch)\n", "            first = None\n", 3001030),
    Bug("who left an engine where nothing listens is not accused",
        "gateway/routing/request_forwarder.py",
        "                if exc.ended:\n", "                if False:\n", 6666),
    Bug("a connection that an engine's end resets is taken for a machine that vanished",
        "gateway/routing/upstream.py",
        "            vanished = exc.os_error.errno in _NO_ANSWER\n",
        "            vanished = not isinstance(exc.os_error, ConnectionRefusedError)\n", 2980088),
    Bug("who was refused goes on before those that the engine had are suspected",
        "gateway/routing/request_forwarder.py",
        "                    await _wait_until_suspected(engine)\n", "", 657),
    Bug("equal requests go to all engines once an answer has begun",
        "gateway/routing/request_forwarder.py",
        "                place.begin()\n\n        exchange = Exchange(",
        "                place.begin()\n            self._let_equal_ones_go(request)\n\n"
        "        exchange = Exchange(", 23098),
    Bug("a suspect whose client left an engine runs until its answer begins",
        "gateway/routing/quarantine.py", "(found.begun or found.left)", "found.begun", 32020),
    Bug("a lack of memory that others took is a request's fault", "launch/serve/attempt.py",
        'if ending.kind == "out_of_memory" and taken:', "if False:", 2230139),
    Bug("room is given back twice", "gateway/routing/request_forwarder.py",
        "            self.left = self._door.begin(", "            self._door.begin("),
    Bug("room is kept where an engine breaks off", "gateway/routing/request_forwarder.py",
        "            place.leave(LEFT_SECONDS if unanswered or exchange.outcome.stuck else 0.0)\n",
        ""),
    Bug("room is given back where only a connection breaks",
        "gateway/routing/request_forwarder.py",
        "unanswered |= exchange.outcome.broken and not exchange.outcome.answered", "pass", 307831),
    Bug("outstanding requests are never taken off", "gateway/routing/exchange.py",
        "            engine.outstanding -= 1\n", ""),
    Bug("a broken stream ends without an error", "gateway/routing/exchange.py",
        "        event = refusal_event(self._route.api, refusal)\n",
        "        return\n        event = refusal_event(self._route.api, refusal)\n"),
    Bug("an engine that answers again stays out", "gateway/routing/health.py",
        "            engine.up = True\n", ""),
    Bug("requests of an engine that is given up wait on", "gateway/routing/health.py",
        "        engine.abort_all(died=died)\n", ""),
    Bug("a silent engine is not asked", "gateway/routing/health.py",
        "now - engine.last_byte > self._stall", "now - engine.last_byte > 1e9"),
    Bug("a convicted request is let through", "gateway/routing/quarantine.py",
        "            raise _convicted(conviction)\n", "            pass\n"),
    Bug("a suspect's next engine is not asked", "gateway/routing/trials.py",
        "                self._ask(engine)\n", "                pass\n"),
    Bug("an engine that is stuck keeps the line", "gateway/routing/trials.py",
        "not _empty(engine) and any(map(_empty, self._able(besides=engine)))", "False",
        1434545),
    Bug("who leaves a dead engine is forgotten", "gateway/routing/exchange.py",
        "if engine.dead_since(self._sent_at):", "if False:"),
    Bug("a death is noted once", "gateway/routing/engines.py",
        "self.death is None or max(self.last_success, sent_at) > self.died_at",
        "self.death is None", 7),
    Bug("an engine that waits is not started", "launch/serve/supervisor.py",
        "if now >= engine.again_at and", "if now >= engine.again_at + 1e9 and"),
    Bug("an engine that takes no signal is left", "launch/serve/supervisor.py",
        "        self._strike()\n        deadline = time.monotonic() + _LAST_SECONDS\n"
        "        for engine, _ in running:\n"
        "            self._end(engine, max(0.5, deadline - time.monotonic()))\n", ""),
    Bug("a broken circuit never closes", "launch/engine/supervised_engine.py",
        '"broken", now + timing.window', '"broken", now + 1e9'),
    Bug("a hung engine is never given up", "launch/engine/supervised_engine.py",
        "            if failures >= _LIVENESS_FAILURES:", "            if failures >= 10**9:"),
    Bug("an ended engine's lease counts as settled", "launch/serve/leases.py",
        "        return all(start_time(pid) == began for pid, began in self.engines)\n",
        "        return self.ready\n", 6),
    Bug("a cache beyond its plan is not reserved", "launch/serve/reservations.py",
        "    need += lease.surplus.get(gpu.uuid, 0)\n", "", 1396),
    Bug("an engine that does not tell how large its cache is holds what its plan says",
        "launch/serve/reservations.py",
        "max(0 if lease.told else growth, need - sum(known))",
        "max(0, need - sum(known))", 558846),
    Bug("what dead turbofits left behind goes on", "launch/serve/planner.py",
        "    for text in end_orphans(leases):\n", "    for text in ():\n", 1565109),
    Bug("a plan is not reserved", "launch/serve/planner.py",
        "                self._leases.reserve(plan)\n        return plan\n",
        "                pass\n        return plan\n"),
    Bug("a lease is left at the end", "launch/serve/leases.py",
        'for suffix in (".json", ".lock") if', "for suffix in () if"),
    Bug("a record is written in place", "core/process/files.py",
        "    descriptor, temporary = open_beside(target) if mode is None",
        "    target.write_bytes(raw)\n    return\n"
        "    descriptor, temporary = open_beside(target) if mode is None"),
    Bug("the gateway is left open under another plan", "launch/serve/attempt.py",
        "            self._front.stop(drain=not urgent)\n", "            pass\n"),
    Bug("an error of the driver ends the watch", "launch/serve/gpu_monitor.py",
        "    except TurbofitError as exc:\n        return None, exc.message\n"
        "    except Exception as exc:  # noqa: BLE001 - whatever it is, the engines still serve\n",
        "    except ZeroDivisionError as exc:\n"),
    # Bugs that simulated days once found here.
    Bug("an engine's page is waited for without end", "gateway/routing/upstream.py",
        "await asyncio.wait_for(self._page(engine, path), seconds)",
        "await self._page(engine, path)", 18),
    Bug("a verdict on an equal request is not waited for", "gateway/routing/request_forwarder.py",
        "            self._quarantine.refuse_convicted(suspected)\n        except Refusal:",
        "            pass\n        except Refusal:", 310285),
    Bug("convictions are kept by the number of cards", "gateway/quarantine/quarantine_file.py",
        "sorted({plan.machine.gpu(index).name for index in plan.machine.visible})",
        "sorted([plan.machine.gpu(index).name for index in plan.machine.visible])", 791),
    Bug("a conviction is not written after a full disk", "gateway/routing/quarantine.py",
        "            self._again = loop.call_later(_AGAIN_SECONDS, self.keep)",
        "            self._again = None", 2168),
    Bug("who left an engine alone is never convicted of its death",
        "gateway/routing/quarantine.py",
        "alone=again or (alone and one is last)", "alone=False", 3091),
    Bug("a suspect runs where a client has just left", "gateway/routing/trials.py",
        "    return engine.idle and not engine.may_have_another()\n", "    return engine.idle\n",
        3015320),
    Bug("a client is told of a conviction before a supervisor has said what the engine died of",
        "gateway/routing/request_forwarder.py",
        "        if why is None and outcome.death is not None and await "
        "self._quarantine.convicts(request):\n            why = \"second_death\"\n",
        "        if request.identity is not None:\n"
        "            self._quarantine.refuse_convicted(await request.identity.fingerprint())\n"),
    Bug("who left is accused by the time at which a supervisor saw the end",
        "gateway/routing/engines.py",
        "min(time.monotonic(), self.failed_at)", "time.monotonic()"),
    Bug("a lost card accuses a request", "launch/serve/attempt.py",
        'ending.kind == "killed" or any_lost(uuids)', 'ending.kind == "killed"', 441118),
    Bug("a conviction that is taken back goes on explaining", "gateway/quarantine/suspects.py",
        "                self._unexplain(earlier)\n", "                pass\n", 441118),
    Bug("an engine whose loop has ended has answered", "gateway/routing/exchange.py",
        "if response.status == 503 and _UNAVAILABLE in data:", "if False:", 530172),
    Bug("who kills an engine whose loop has ended is taken for what ended it",
        "launch/engine/supervised_engine.py",
        "if code is not None and not self.tracker.failing:", "if code is not None:", 558323),
    Bug("deaths count for as long as the clock was ahead", "gateway/routing/quarantine.py",
        ".none_ahead(kept_time())", "", 1112),
    Bug("half a line stays in a batch's output", "batch/output_file.py",
        "            os.ftruncate(self._fd, self._size)\n", ""),
    Bug("a batch gives an item up where no engine serves", "batch/sender.py",
        "429, 502, 503, 504", "429, 502, 504"),
    Bug("a record is not written after a full disk", "launch/serve/attempt.py",
        "        if self._job.record.unwritten:", "        if False:", 832),
    Bug("a calibration goes on with what it read while others had given memory back",
        "launch/calibrate/progress.py",
        "one is not None and _differs(one, more)", "False", 498599),
    Bug("a calibration takes the card that was to be the fullest for the one that was",
        "observe/calibration.py",
        "key=lambda ledger: free_for_cache(ledger) - _drift(one, ledger)", "key=free_for_cache",
        928350),
    Bug("what a calibration had read when it was killed is learned without another start",
        "cli/commands/calibrate.py", "ended = _drive(job, plan, stop, progress)",
        "ended = None if progress.seen else _drive(job, plan, stop, progress)", 1890352),
    Bug("memory that others gave back is learned", "launch/calibrate/calibration_store.py",
        "if abs(more) > _MOVED:", "if more > _MOVED:", 3574),
    Bug("an engine that ended as all were given up is told of to nobody",
        "launch/serve/supervisor.py", "            self._tell_ends(now)\n", "", 1882925),
    Bug("a replica's cache is sized by the cards of all replicas", "launch/engine/fitted_cache.py",
        "gpus = [gpu for gpu in one.gpus if gpu.index in members]", "gpus = list(one.gpus)",
        1775468),
    Bug("a lease is not written after a full disk", "launch/serve/leases.py",
        "            self.unwritten = True\n", '            self.alone = "the disk is full"\n',
        611),
    Bug("the next gateway does not take over what a full disk refused", "launch/serve/attempt.py",
        "            gateway.quarantine.take_over(job.quarantine)", "            pass", 391918),
)  # fmt: skip


def main() -> int:
    """Plant each, simulate, and say what was found; 1 where one was not."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulation.planted", description=__doc__)
    parser.add_argument("--days", type=int, default=1000, help="simulated days for each, at most")
    parser.add_argument("--only", default="", help="bugs whose name has this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="write PLANTED.md")
    given = parser.parse_args()
    rows = []
    for bug in BUGS:
        if given.only in bug.name:
            seed, what, seconds = tried(bug, range(given.days), given.workers)
            if seed is None and bug.seed is not None:
                seed, what, _ = tried(bug, range(bug.seed, bug.seed + 1), 1)
            rows.append((bug, seed, what, seconds))
            found = f"seed {seed}: {what[:120]}" if seed is not None else "NOT FOUND"
            print(f"{bug.name}: {found} ({seconds:.0f} s)", flush=True)
    if given.write:
        _write(rows, given.days)
    return 0 if all(seed is not None for _, seed, _, _ in rows) else 1


def planted(bug: Bug, folder: Path) -> None:
    """A copy of turbofit and its benches with one bug.

    Raises:
        ValueError: the code that it changes is not there, or not once.
    """
    for name in ("turbofit", "bench", "presets"):
        if (_REPO / name).is_dir():
            shutil.copytree(
                _REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    path = folder / "turbofit" / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.file} has {text.count(bug.old)} places for {bug.name!r}, not one")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def tried(bug: Bug, seeds: range, workers: int) -> tuple[int | None, str, float]:
    """The first seed at which a planted bug shows, what showed it, and seconds that it took.

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
    seconds = time.monotonic() - began
    if " simulated " not in done.stdout:
        raise RuntimeError(done.stderr[-2000:])
    return (int(match[1]), match[2], seconds) if match else (None, "", seconds)


def _write(rows: list[tuple[Bug, int | None, str, float]], days: int) -> None:
    found = sum(seed is not None for _, seed, _, _ in rows)
    date = time.strftime("%Y-%m-%d")
    lines = [
        "# Planted bugs", "",
        f"{found} of {len(rows)} bugs are found, within {days:,} simulated days each or, beyond "
        "them, at a seed that shows it. Written by "
        f"`python -m bench.simulation.planted --write`, {date}.", "",
        "| bug | in | first seed | what showed it |", "|---|---|---|---|",
    ]  # fmt: skip
    for bug, seed, what, _ in rows:
        text = what[:150].replace("|", "/")
        lines.append(f"| {bug.name} | `{bug.file}` | {'none' if seed is None else seed} | {text} |")
    path = Path(__file__).with_name("PLANTED.md")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
