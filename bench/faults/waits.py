"""How long a client waits for an engine: after ``kill -9`` under load, and after ``--idle``.

    python -m bench.faults.waits [--count 10]

LMDeploy's real server and TurboMind on a pretend card. What stands by has done its imports before
each. A kill has a server of its own: the pauses before restarts of one server grow. Seconds are of
the clock; processor seconds are those of the server and of the process that becomes the engine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import threading
import time
from typing import NamedTuple

from bench.faults.ground import Ground, Server
from bench.proc import cpu_seconds
from tests.support.processes import gone
from tests.support.serving import image

WORDS = ("internvl2-2b", "--on", "1xrtx3090")
CLIENTS = 4


class Wait(NamedTuple):
    seconds: float
    processor: float
    load: float
    became: bool


def spent(server: Server, waiting: int) -> float:
    return cpu_seconds(server.process.pid) + cpu_seconds(waiting)


def killed(ground: Ground) -> Wait:
    """From the kill of an engine under load to the first answer to a request made since then."""
    server = ground.pretend(*WORDS)
    server.opened(600.0)
    waiting = server.standby()
    kill_at, back = [float("inf")], threading.Event()
    answered = [threading.Event() for _ in range(CLIENTS)]

    def ask(number: int) -> None:
        while not back.is_set():
            began = time.monotonic()
            if server.status(image(448, 448)) == 200:
                answered[number].set()
                if began > kill_at[0]:
                    back.set()
            else:
                time.sleep(0.1)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for event in answered:
        event.wait(60.0)
    before, load = spent(server, waiting), os.getloadavg()[0]
    engine = server.engines()[-1]
    kill_at[0] = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    back.wait(300.0)
    took = time.monotonic() - kill_at[0]
    became = server.engines()[-1] == waiting
    wait = Wait(took, spent(server, waiting) - before if became else 0.0, load, became)
    back.set()
    for client in clients:
        client.join(60.0)
    server.end()
    return wait


def woken(ground: Ground, server: Server) -> Wait:
    """From a request to a server whose engine sleeps to its answer."""
    engine, folder = server.engines()[-1], server.run
    gone(engine)
    ground.until(
        lambda: '"state":"ended"' in (folder / "run.json").read_text().replace(" ", ""), 60.0
    )
    waiting = server.standby()
    before, load, began = spent(server, waiting), os.getloadavg()[0], time.monotonic()
    status = server.status(image(448, 448))
    took = time.monotonic() - began
    became = status == 200 and server.engines()[-1] == waiting
    return Wait(took, spent(server, waiting) - before if became else 0.0, load, became)


def tell(name: str, waits: list[Wait]) -> None:
    for wait in waits:
        print(
            f"{name}: {wait.seconds:.1f} s, {wait.processor:.1f} s of processors, load average "
            f"{wait.load:.1f}{'' if wait.became else ', not by what stood by'}",
            flush=True,
        )


def tell_all(name: str, waits: list[Wait]) -> None:
    for what in ("seconds", "processor", "load"):
        figures = [getattr(wait, what) for wait in waits]
        median = statistics.median(figures)
        print(f"{name}: {what}: median {median:.1f}, worst {max(figures):.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.waits", description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    count = parser.parse_args().count
    kills: list[Wait] = []
    with Ground() as ground:
        for _ in range(count):
            kills.append(killed(ground))
            tell("kill", kills[-1:])
    wakes: list[Wait] = []
    with Ground() as ground:
        server = ground.pretend(*WORDS, "--idle", "1s")
        server.opened(600.0)
        for _ in range(count):
            wakes.append(woken(ground, server))
            tell("wake", wakes[-1:])
        server.end()
    tell_all("kill", kills)
    tell_all("wake", wakes)


if __name__ == "__main__":
    main()
