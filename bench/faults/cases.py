"""The faults: each starts a server, breaks something, and says how it ended.

Two kinds of server: ``pretend`` is LMDeploy's real server and engine on pretend GPUs; ``stand-in``
prints and dies like an engine but starts in a second, for what is about processes and files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from bench.faults.ground import Ground, Outcome, Server
from bench.proc import cpu_seconds
from tests.support.processes import CUDA_PATH, REPO, alive, gone
from tests.support.serving import image

CASES: dict[str, tuple[str, str, Callable[[Ground], Outcome]]] = {}


def case(name: str, kind: str, bar: str) -> Callable[[Callable[[Ground], Outcome]], object]:
    def register(function: Callable[[Ground], Outcome]) -> Callable[[Ground], Outcome]:
        CASES[name] = (kind, bar, function)
        return function

    return register


@case("engine killed (SIGKILL) under load", "pretend", "started again, answers, no request hangs")
def engine_killed(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090")
    server.opened()
    statuses, load = _load(server, 8, image(896, 448))
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(server.engines()[0], signal.SIGKILL)
    for one in load:
        one.join(60)
    hung = sum(one.is_alive() for one in load)
    server.wait_for("phase: ready", count=2)
    back = time.monotonic() - began
    fine = server.until_answers(image(448, 448))
    ended = server.end()
    return Outcome(
        ok=not hung and fine and ended == 0,
        said=f"back after {back:.1f} s; the 8 open requests: {_counts(statuses)}; {hung} hung; "
        f"end {ended}",
    )


@case("turbofit killed (SIGKILL) while it serves", "pretend", "no process left; next start works")
def turbofit_killed(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090")
    server.opened()
    engines = server.engines()
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    left = [pid for pid in engines if not gone(pid, 5.0)]
    again = ground.pretend("internvl2-8b", "--on", "1xrtx3090", port=server.port)
    again.opened()
    fine = again.until_answers(image(448, 448))
    ended = again.end()
    return Outcome(
        ok=not left and fine and ended == 0 and not ground.leases(),
        said=f"{len(left)} engines left after 5 s; next start answers: {fine}",
    )


@case("one of four replicas killed", "pretend", "the others answer meanwhile; started again")
def replica_killed(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "4xrtx3090", "--replicas", "4")
    server.opened()
    os.kill(server.engines()[1], signal.SIGKILL)
    statuses = [server.status(image(448, 448)) for _ in range(10)]
    server.wait_for("phase: ready", count=5)
    ended = server.end()
    return Outcome(
        ok=all(status == 200 for status in statuses) and ended == 0,
        said=f"10 requests at once after the kill: {_counts(statuses)}; end {ended}",
    )


@case("SIGTERM while planning", "pretend", "exit 0, nothing left")
def term_planning(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090")
    server.wait_for("PRETEND")
    return _ended(server.end(), server.engines(), ground)


@case("SIGTERM to an engine that ignores it", "stand-in", "exit 0 within the drain")
def term_deaf(ground: Ground) -> Outcome:
    server = ground.standin("deaf")
    server.wait_for("OPEN")
    began = time.monotonic()
    return _ended(server.end(), server.engines(), ground, time.monotonic() - began)


@case("SIGTERM with streams open", "pretend", "they end, exit 0 within the drain")
def term_streams(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090", "--drain", "10")
    server.opened()
    statuses, load = _load(server, 4, image(1344, 896))
    time.sleep(0.2)
    began = time.monotonic()
    code = server.end()
    took = time.monotonic() - began
    for one in load:
        one.join(30)
    return Outcome(
        ok=code == 0 and took < 25 and all(gone(pid, 1.0) for pid in server.engines()),
        said=f"{_counts(statuses)} of 4; exit {code} after {took:.1f} s",
    )


@case("disk full while it serves", "stand-in", "the log stops, the server does not")
def disk_full(ground: Ground) -> Outcome:
    server = ground.standin("floods")
    server.wait_for("OPEN")
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    time.sleep(3)
    fine = all(server.ask("/health", timeout=10)[0] == 200 for _ in range(5))
    size = sum(path.stat().st_size for path in server.run.iterdir() if path.is_file())
    code = server.end()
    return Outcome(
        ok=fine and code == 0,
        said=f"answers: {fine}; {size >> 10} KiB in the run's folder; end {code}",
    )


@case("warm-up hangs (cache too small), prefill set by the user", "stand-in", "exit 3, named")
def hang_fixed(ground: Ground) -> Outcome:
    server = ground.standin("hang", fixed={"max_prefill_token_num": 4096})
    server.wait_for("phase: warm-up")
    before = cpu_seconds(server.process.pid)
    time.sleep(1.5)
    # The engine prints 36,000 lines a second now: 54,000 are read by this time, for little.
    spent = cpu_seconds(server.process.pid) - before
    code = server.finish(60)
    said = server.has("hangs in its warm-up")
    return Outcome(
        ok=code == 3 and said and spent < 0.5,
        said=f"exit {code}, named: {said}; reading 1.5 s of its lines took {spent:.2f} s of CPU",
    )


def _taken(
    size: str,
    words: tuple[str, ...] = ("internvl2-8b", "--on", "1xrtx3090"),
    picture: tuple[int, int] = (4480, 4480),
    **environ: str,
) -> Callable[[Ground], Outcome]:
    def run(ground: Ground) -> Outcome:
        server = ground.pretend(*words, TURBOFIT_PRETEND_TAKEN=size, **environ)
        server.opened(180)
        attempts = server.record["attempts"]
        died = attempts[0]["ended"]
        fine = server.until_answers(image(*picture))
        code = server.end()
        again = ground.pretend(*words, port=server.port, TURBOFIT_PRETEND_TAKEN=size, **environ)
        again.opened(180)
        remembered = len(again.record["attempts"]) == 1
        again.end()
        return Outcome(
            ok=fine and code == 0 and remembered,
            said=f"{died['phase']} ({died['where']}) asked {died['asked'] >> 20} MiB of "
            f"{died['left'] >> 20} left; served at start {len(attempts)}; next time at once: "
            f"{remembered}",
        )

    return run


case("out of memory in the warm-up (900 MiB taken)", "pretend", "re-planned, serves, remembered")(
    _taken("900MiB")
)
case("out of memory at an image (400 MiB taken)", "pretend", "re-planned, serves, remembered")(
    _taken("400MiB")
)
if CUDA_PATH:  # LMDeploy's PyTorch engine runs on a CUDA build of torch
    case(
        "out of memory, PyTorch engine (1500 MiB taken)",
        "pretend",
        "re-planned, serves, remembered",
    )(
        _taken(
            "1500MiB",
            ("qwen2-vl-2b", "--engine", "pytorch", "--on", "1xrtx3060"),
            (3584, 3584),
            PYTHONPATH=f"{CUDA_PATH}:{REPO}",
        )
    )


@case("out of memory at the N-th image, no gateway", "pretend", "typed, re-planned, serves again")
def image_no_gateway(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090", "--no-gateway")
    server.opened()
    fine = [server.status(image(896, 896)) for _ in range(3)]
    last = server.status(image(4480, 4480, max_dynamic_patch=120))
    server.wait_for("ladder 1/3", 60)
    died = server.record["attempts"][0]["ended"]
    server.wait_for("phase: ready", 60, count=2)
    code = server.end()
    return Outcome(
        ok=fine == [200] * 3 and last != 200 and died["phase"] == "vision" and code == 0,
        said=f"3 answered, the 4th killed it in {died['where']} ({died['missing'] >> 20} MiB "
        "missing); planned again",
    )


@case(
    "out of memory while it serves, behind the gateway", "pretend", "503, re-planned, opens again"
)
def image_behind_gateway(ground: Ground) -> Outcome:
    words = ("internvl2-8b", "--on", "1xrtx3090", "--images", "4", "--check", "none")
    server = ground.pretend(*words, TURBOFIT_PRETEND_TAKEN="700MiB")
    server.opened()
    four = [image(1792, 1344)] * 4
    began = time.monotonic()
    first, died = server.status(image(448, 448)), server.status(*four)
    back = server.until_answers(image(448, 448))
    took = time.monotonic() - began
    again, code = server.status(*four), server.end()
    return Outcome(
        ok=(first, again, code) == (200, 200, 0) and died in (0, 503) and back,
        said=f"4 images: {died or 'connection lost'}; answers again {took:.0f} s later; the same 4 "
        f"images then: {again}",
    )


@case(
    "the standby is killed, then the engine, then the engine beside a new standby",
    "pretend",
    "answers again each time, the last time by what stood by",
)
def standby_killed(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-2b", "--on", "1xrtx3090")
    server.opened()
    took, waiting = [], server.standby()
    for number in range(3):
        began = time.monotonic()
        # The engine ends before anybody has looked after what stood by.
        os.kill(server.engines()[-1] if number else waiting, signal.SIGKILL)
        if not server.until_answers(image(448, 448), 200.0):
            return Outcome(ok=False, said=f"no answer after kill {number + 1}")
        took.append(f"{time.monotonic() - began:.1f}")
        waiting = waiting if number != 1 else server.standby()
    became = server.engines()[-1] == waiting
    code = server.end()
    left = [pid for pid in (*server.engines(), waiting) if alive(pid)]
    return Outcome(
        ok=became and code == 0 and not left and not ground.leases(),
        said=f"answers {', '.join(took)} s later; {len(left)} processes left",
    )


@case("50 restarts of the engine in a row", "stand-in", "no process, descriptor or lock leaks")
def many_restarts(ground: Ground) -> Outcome:
    server = ground.standin("serve", timing={"restarts": 1000, "backoff": 0.01,
                                             "longest_backoff": 0.05})  # fmt: skip
    server.wait_for("OPEN")
    time.sleep(0.5)
    before, threads = _count(server.process.pid, "fd"), _count(server.process.pid, "task")
    for number in range(50):
        os.kill(server.engines()[-1], signal.SIGSEGV if number % 2 else signal.SIGKILL)
        server.wait_for("phase: ready", 30, count=number + 2)
    time.sleep(1.0)
    after, now = _count(server.process.pid, "fd"), _count(server.process.pid, "task")
    left = [pid for pid in server.engines()[:-1] if alive(pid)]
    code = server.end()
    return Outcome(
        ok=after <= before and now <= threads and not left and code == 0 and not ground.leases(),
        said=f"descriptors {before} -> {after}, threads {threads} -> {now}, {len(left)} processes "
        f"left, leases left: {len(ground.leases())}",
    )


@case("20 launches in a row, every other one killed", "stand-in", "no lease or process is left")
def many_launches(ground: Ground) -> Outcome:
    engines: list[int] = []
    port = None
    for number in range(20):
        server = ground.standin("serve", port=port)
        port = server.port
        server.wait_for("OPEN")
        engines += server.engines()
        if number % 2:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            [gone(pid, 5.0) for pid in server.engines()]
        elif server.end() != 0:
            return Outcome(ok=False, said=f"launch {number} did not end in order")
    last = ground.standin("serve", port=port)
    last.wait_for("OPEN")
    last.end()
    left = [pid for pid in engines if alive(pid)]
    return Outcome(
        ok=not left and not ground.leases(),
        said=f"{len(left)} processes left, {len(ground.leases())} leases left",
    )


_WRITER = """
import sys
from pathlib import Path
from turbofit.launch.serve.runs import Record
record = Record(Path(sys.argv[1]), model="m")
print("x", flush=True)
for number in range(10**9):
    record.event("n", "x" * (number % 5000))
"""


@case("killed while it writes its record (50 times)", "stand-in", "the record is always whole")
def record_whole(ground: Ground) -> Outcome:
    broken = 0
    for number in range(50):
        argv = [sys.executable, "-c", _WRITER, str(ground.state)]
        with subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(number * 0.001)
            writer.kill()
        try:
            json.loads((ground.state / "run.json").read_text(encoding="utf-8"))
        except ValueError:
            broken += 1
    return Outcome(ok=not broken, said=f"{broken} of 50 broken")


def _fails(number: int, phase: str) -> Callable[[Ground], Outcome]:
    """One allocation of LMDeploy's real engine: the number is of InternVL2-1B on an RTX 3060."""

    def run(ground: Ground) -> Outcome:
        words = ("internvl2-1b", "--on", "1xrtx3060", "--no-rehearse")
        server = ground.pretend(*words, TURBOFIT_PRETEND_FAIL=str(number))
        server.opened(240)
        ended = server.record["attempts"][0]["ended"]
        fine = server.until_answers(image(448, 448))
        code = server.end()
        return Outcome(
            ok=fine and code == 0 and (ended["kind"], ended["phase"]) == ("out_of_memory", phase),
            said=f"{ended['kind']} in {ended['phase']} named; {server.line('ladder 1/3: ')}",
        )

    return run


for _number, _phase in ((100, "weights"), (1616, "cache"), (1700, "warm-up")):
    case(f"one allocation fails: {_phase}", "pretend", "named, planned again, serves")(
        _fails(_number, _phase)
    )


def _ended(code: int, engines: list[int], ground: Ground, took: float | None = None) -> Outcome:
    left = [pid for pid in engines if not gone(pid, 2.0)]
    time_taken = "" if took is None else f" after {took:.1f} s"
    return Outcome(
        ok=code == 0 and not left and not ground.leases(),
        said=f"exit {code}{time_taken}, {len(left)} processes left",
    )


def _count(pid: int, what: str) -> int:
    """Descriptors (``fd``) or threads (``task``) of a process."""
    return len(os.listdir(f"/proc/{pid}/{what}"))


def _load(
    server: Server, count: int, part: dict[str, Any]
) -> tuple[list[int], list[threading.Thread]]:
    """So many requests at once, begun; their statuses come as they end."""
    statuses: list[int] = []
    load = [
        threading.Thread(target=lambda: statuses.append(server.status(part))) for _ in range(count)
    ]
    for one in load:
        one.start()
    return statuses, load


def _counts(statuses: list[int]) -> str:
    found = {status: statuses.count(status) for status in sorted(set(statuses))}
    return ", ".join(f"{count} x {status or 'connection lost'}" for status, count in found.items())
