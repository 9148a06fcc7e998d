"""Measures how long clients wait for an engine, after ``kill -9`` under load and after ``--idle``.

    python -m bench.faults.waits [--count 10]

LMDeploy's real server and TurboMind run on a pretend card. The standby process has done its imports
before each trial. Each kill has a server of its own, since a server's pauses before restarts grow.
Seconds are of the clock; processor seconds are of the server and of the standby.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from bench.proc import cpu_seconds
from tests.support.processes import Child, gone, pids, standby_beside
from tests.support.serving import Served, image, serve_pretend
from tests.support.waiting import until

CLIENTS = 4


@contextmanager
def server(*words: str) -> Iterator[Served]:
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="turbofit-waits-") as folder:
        words = ("internvl2-2b", "--on", "1xrtx3090", *words)
        served = serve_pretend(children, Path(folder), *words, standby=True)
        try:
            served.wait()
            yield served
        finally:
            served.child.process.send_signal(signal.SIGTERM)
            served.child.finish()


def answers(served: Served) -> bool:
    with suppress(OSError, HTTPException, ValueError, LookupError, TypeError):
        return bool(served.chat(image(448, 448))[0] == 200)
    return False


def stands_by(served: Served) -> int:
    """Return the pid of the standby, once it has imported everything and waits in read(2)."""

    def reading() -> int:
        pid = standby_beside(served.child) or 0
        with suppress(OSError):
            call = Path(f"/proc/{pid}/syscall").read_text().split()
            # The number of read(2) on x86-64, and on arm64; of its standard input.
            return pid if call[0] in ("0", "63") and call[1:2] == ["0x0"] else 0
        return 0

    return until(reading, "a process that stands by")


def waited(served: Served, act: Callable[[], object]) -> tuple[float, ...]:
    """Return seconds, processor seconds and load average of ``act``, which ends at an answer."""
    processes = (served.child.process.pid, stands_by(served))
    before, load, began = sum(map(cpu_seconds, processes)), os.getloadavg()[0], time.monotonic()
    act()
    took = time.monotonic() - began
    assert pids(served.child)[-1] == processes[1], "another process than the standby"
    return took, sum(map(cpu_seconds, processes)) - before, load


def killed() -> tuple[float, ...]:
    """Measure from the kill of an engine under load to the first answer to a later request."""
    kill_at, back = [float("inf")], threading.Event()
    loaded = threading.Barrier(CLIENTS + 1)

    def client(served: Served) -> None:
        until(lambda: answers(served), "a first answer")
        loaded.wait()
        while not back.is_set():
            began = time.monotonic()
            if not answers(served):
                time.sleep(0.1)
            elif began > kill_at[0]:
                back.set()

    def kill(served: Served) -> None:
        kill_at[0] = time.monotonic()
        os.kill(pids(served.child)[-1], signal.SIGKILL)
        back.wait()

    with server() as served:
        clients = [threading.Thread(target=client, args=(served,)) for _ in range(CLIENTS)]
        for one in clients:
            one.start()
        loaded.wait()
        wait = waited(served, lambda: kill(served))
        for one in clients:
            one.join()
    return wait


def woken(served: Served) -> tuple[float, ...]:
    """Measure from a request to a server whose engine sleeps until its answer."""
    gone(pids(served.child)[-1])
    runs = served.state / "turbofit" / "runs"
    newest = max(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    until(lambda: '"state":"ended"' in newest.read_text().replace(" ", ""), "the end of its run")
    return waited(served, lambda: until(lambda: answers(served), "an answer"))


def tell(name: str, waits: list[tuple[float, ...]]) -> None:
    for what, figures in zip(
        ("seconds", "processor", "load"), zip(*waits, strict=True), strict=True
    ):
        median = statistics.median(figures)
        print(f"{name}: {what}: median {median:.1f}, worst {max(figures):.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.waits", description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    count = parser.parse_args().count
    tell("kill", [killed() for _ in range(count)])
    with server("--idle", "1s") as served:
        tell("wake", [woken(served) for _ in range(count)])


if __name__ == "__main__":
    main()
