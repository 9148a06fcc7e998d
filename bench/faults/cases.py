"""The faults: each starts a server, breaks something, and says how it ended.

Two kinds of server: ``pretend`` is LMDeploy's real server and engine on pretend GPUs; ``stand-in``
prints and dies like an engine but starts in a second, for what is about processes and files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.faults.ground import Ground, Outcome, Server, alive, fds, gone, image
from tests.support.processes import CUDA_PATH
from tests.support.processes import REPO as ROOT

CASES: dict[str, tuple[str, str, Callable[[Ground], Outcome]]] = {}


def case(name: str, kind: str, bar: str) -> Callable[[Callable[[Ground], Outcome]], object]:
    def register(function: Callable[[Ground], Outcome]) -> Callable[[Ground], Outcome]:
        CASES[name] = (kind, bar, function)
        return function

    return register


@case("engine killed (SIGKILL) under load", "pretend", "started again, answers, no request hangs")
def engine_killed(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090")
    server.wait()
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
    server.wait()
    engines = server.engines()
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    left = [pid for pid in engines if not gone(pid, 5.0)]
    again = ground.pretend("internvl2-8b", "--on", "1xrtx3090", port=server.port)
    again.wait()
    fine = again.until_answers(image(448, 448))
    ended = again.end()
    return Outcome(
        ok=not left and fine and ended == 0 and not ground.leases(),
        said=f"{len(left)} engines left after 5 s; next start answers: {fine}",
    )


@case("turbofit killed, its engine had children", "stand-in", "the next start ends them")
def orphans(ground: Ground) -> Outcome:
    server = ground.standin("family")
    server.wait_for("OPEN")
    child = int(server.log().partition("CHILD ")[2].split()[0])
    ground.until(ground.leases_with_engines)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    orphan = alive(child)
    again = ground.standin("serve", port=server.port)
    again.wait_for("OPEN")
    ended = gone(child, 5.0)
    code = again.end()
    return Outcome(ok=ended and code == 0, said=f"orphan before: {orphan}; after: {not ended}")


@case("one of four replicas killed", "pretend", "the others answer meanwhile; started again")
def replica_killed(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "4xrtx3090", "--replicas", "4")
    server.wait()
    os.kill(server.engines()[1], signal.SIGKILL)
    statuses = [server.chat(image(448, 448)) for _ in range(10)]
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


def _term(line: str, script: str) -> Callable[[Ground], Outcome]:
    def run(ground: Ground) -> Outcome:
        server = ground.standin(script)
        server.wait_for(line)
        began = time.monotonic()
        code = server.end()
        return _ended(code, server.engines(), ground, time.monotonic() - began)

    return run


case("SIGTERM while it starts", "stand-in", "exit 0, nothing left")(
    _term("phase: starting", "slow")
)
case("SIGTERM while weights load", "stand-in", "exit 0, nothing left")(
    _term("phase: weights", "stuck_weights")
)
case("SIGTERM in the check", "stand-in", "exit 0 within the drain")(
    _term("phase: check", "slow_image")
)
case("SIGTERM in the warm-up", "stand-in", "exit 0, nothing left")(_term("phase: warm-up", "stuck"))
case("SIGTERM to an engine that ignores it", "stand-in", "exit 0 within the drain")(
    _term("OPEN", "deaf")
)


@case("SIGTERM with streams open", "pretend", "they end, exit 0 within the drain")
def term_streams(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090", "--drain", "10")
    server.wait()
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
    fine = all(server.raw("/health") == 200 for _ in range(5))
    size = sum(path.stat().st_size for path in server.run().iterdir() if path.is_file())
    code = server.end()
    return Outcome(
        ok=fine and code == 0,
        said=f"answers: {fine}; {size >> 10} KiB in the run's folder; end {code}",
    )


@case("port taken", "pretend", "exit 5 before anything is loaded")
def port_taken(ground: Ground) -> Outcome:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        server = ground.pretend("internvl2-8b", "--on", "1xrtx3090", port=taken.getsockname()[1])
        code = server.finish(60)
        took = time.monotonic() - began
    return Outcome(ok=code == 5 and not server.engines(), said=f"exit {code} after {took:.1f} s")


@case("warm-up hangs (cache too small), prefill set by the user", "stand-in", "exit 3, named")
def hang_fixed(ground: Ground) -> Outcome:
    server = ground.standin("hang", fixed={"max_prefill_token_num": 4096})
    server.wait_for("phase: warm-up")
    before = _cpu_seconds(server.process.pid)
    time.sleep(1.5)
    # The engine prints 36,000 lines a second now: 54,000 are read by this time, for little.
    spent = _cpu_seconds(server.process.pid) - before
    code = server.finish(60)
    said = server.has("hangs in its warm-up")
    return Outcome(
        ok=code == 3 and said and spent < 0.5,
        said=f"exit {code}, named: {said}; reading 1.5 s of its lines took {spent:.2f} s of CPU",
    )


def _cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@case("warm-up hangs once", "stand-in", "smaller prefill, serves")
def hang_ladder(ground: Ground) -> Outcome:
    server = ground.standin("hang,serve")
    server.wait_for("OPEN", 60)
    code = server.end()
    return Outcome(ok=code == 0, said=server.line("ladder 1/3: the warm-up"))


@case("engine lives but answers nothing", "stand-in", "noticed, started again")
def stall(ground: Ground) -> Outcome:
    server = ground.standin("stalls,serve", timing={"liveness": 0.5, "patience": 1.0})
    server.wait_for("OPEN")
    began = time.monotonic()
    server.wait_for("answers no completion", 30)
    server.wait_for("phase: ready", 30, count=2)
    took = time.monotonic() - began
    code = server.end()
    return Outcome(ok=code == 0, said=f"ready again {took:.1f} s later (probe 0.5 s, patience 1 s)")


def _taken(
    size: str,
    words: tuple[str, ...] = ("internvl2-8b", "--on", "1xrtx3090"),
    picture: tuple[int, int] = (4480, 4480),
    **environ: str,
) -> Callable[[Ground], Outcome]:
    def run(ground: Ground) -> Outcome:
        server = ground.pretend(*words, "--pretend-taken", size, **environ)
        server.wait(180)
        attempts = server.record()["attempts"]
        died = attempts[0]["ended"]
        fine = server.until_answers(image(*picture))
        code = server.end()
        again = ground.pretend(*words, "--pretend-taken", size, port=server.port, **environ)
        again.wait(180)
        remembered = len(again.record()["attempts"]) == 1
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
            PYTHONPATH=f"{CUDA_PATH}:{ROOT}",
        )
    )


@case("out of memory at the N-th image, no gateway", "pretend", "typed, re-planned, serves again")
def image_no_gateway(ground: Ground) -> Outcome:
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090", "--no-gateway")
    server.wait()
    fine = [server.chat(image(896, 896)) for _ in range(3)]
    last = server.chat(image(4480, 4480, max_dynamic_patch=120))
    server.wait_for("ladder 1/3", 60)
    died = server.record()["attempts"][0]["ended"]
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
    words = ("--images", "4", "--no-check", "--pretend-taken", "700MiB")
    server = ground.pretend("internvl2-8b", "--on", "1xrtx3090", *words)
    server.wait()
    four = [image(1792, 1344)] * 4
    began = time.monotonic()
    first, died = server.chat(image(448, 448)), server.chat(*four)
    back = server.until_answers(image(448, 448))
    took = time.monotonic() - began
    again, code = server.chat(*four), server.end()
    return Outcome(
        ok=(first, again, code) == (200, 200, 0) and died in (0, 503) and back,
        said=f"4 images: {died or 'connection lost'}; answers again {took:.0f} s later; the same 4 "
        f"images then: {again}",
    )


@case("out of memory whatever is tried", "stand-in", "exit 6 with a table after 4 starts")
def ladder_ends(ground: Ground) -> Outcome:
    server = ground.standin("oom_image")
    code = server.finish(90)
    starts = len(server.record()["attempts"])
    return Outcome(
        ok=code == 6 and starts == 4 and server.has("start  ratio"),
        said=f"exit {code} after {starts} starts",
    )


@case("slow start (20 s)", "stand-in", "waits and serves")
def slow_start(ground: Ground) -> Outcome:
    began = time.monotonic()
    server = ground.standin("slow", STANDIN_SECONDS="20")
    server.wait_for("OPEN", 60)
    code = server.end()
    return Outcome(ok=code == 0, said=f"open after {time.monotonic() - began:.0f} s")


@case("never ready (deadline 3 s)", "stand-in", "exit 5")
def never_ready(ground: Ground) -> Outcome:
    server = ground.standin("stuck", timing={"start": 3.0})
    code = server.finish(30)
    return Outcome(ok=code == 5, said=f"exit {code}")


@case("engine dies again and again", "stand-in", "rests and says so, SIGTERM ends it")
def circuit(ground: Ground) -> Outcome:
    server = ground.standin("serve", timing={"restarts": 3, "backoff": 0.05})
    for number in range(4):
        server.wait_for("phase: ready", 30, count=number + 1)
        os.kill(server.engines()[-1], signal.SIGSEGV)
    server.wait_for("no engine serves until another starts", 30)
    code = server.end()
    return Outcome(ok=code == 0, said=f"rests after {len(server.engines())} starts, exit {code}")


@case("50 restarts of the engine in a row", "stand-in", "no process, descriptor or lock leaks")
def many_restarts(ground: Ground) -> Outcome:
    server = ground.standin("serve", timing={"restarts": 1000, "backoff": 0.01,
                                             "longest_backoff": 0.05})  # fmt: skip
    server.wait_for("OPEN")
    time.sleep(0.5)
    before, threads = fds(server.process.pid), _threads(server.process.pid)
    for number in range(50):
        os.kill(server.engines()[-1], signal.SIGSEGV if number % 2 else signal.SIGKILL)
        server.wait_for("phase: ready", 30, count=number + 2)
    time.sleep(1.0)
    after, now = fds(server.process.pid), _threads(server.process.pid)
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


@case("killed while it writes its record (50 times)", "stand-in", "the record is always whole")
def record_whole(ground: Ground) -> Outcome:
    broken = 0
    for number in range(50):
        path = ground.torn_record(number * 0.001)
        try:
            json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            broken += 1
    return Outcome(ok=not broken, said=f"{broken} of 50 broken")


@case("started by torchrun", "pretend", "exit 5, named")
def torchrun(ground: Ground) -> Outcome:
    server = ground.pretend(
        "internvl2-8b", "--on", "2xrtx3090", "--tp", "2", WORLD_SIZE="2", LOCAL_RANK="0"
    )
    code = server.finish(60)
    named = server.has("whole engines")
    return Outcome(ok=code == 5 and named, said=f"exit {code}, named: {named}")


def _ended(code: int, engines: list[int], ground: Ground, took: float | None = None) -> Outcome:
    left = [pid for pid in engines if not gone(pid, 2.0)]
    time_taken = "" if took is None else f" after {took:.1f} s"
    return Outcome(
        ok=code == 0 and not left and not ground.leases(),
        said=f"exit {code}{time_taken}, {len(left)} processes left",
    )


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _load(
    server: Server, count: int, part: dict[str, Any]
) -> tuple[list[int], list[threading.Thread]]:
    """So many requests at once, begun; their statuses come as they end."""
    statuses: list[int] = []
    load = [
        threading.Thread(target=lambda: statuses.append(server.chat(part))) for _ in range(count)
    ]
    for one in load:
        one.start()
    return statuses, load


def _counts(statuses: list[int]) -> str:
    found = {status: statuses.count(status) for status in sorted(set(statuses))}
    return ", ".join(f"{count} x {status or 'connection lost'}" for status, count in found.items())
