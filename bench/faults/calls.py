"""Each call of the system that turbofit makes fails once: how each run ends.

    python -m bench.faults.calls [--only WORDS] [--calls NAME] [--every N] [--results FILE]

A shim before libc (csrc/failing_calls.c) lets the k-th call fail, for every k of a run: calls on
turbofit's own files (ENOSPC, EIO, EACCES and EROFS in turn; and some ENOSPC from the k-th on, a
disk that stays full), and calls about processes and sockets. The bar: an exit of the contract with
one line of cause and one hint, or none the less what was wanted; no traceback, no hang, no process
left, every document of the state folder whole, and the next run as if nothing had been.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from bench.common.processes import REPO, Child, free_port, gone, pids
from turbofit.pretend.build import compiler

SHIM: Final = Path(__file__).with_name("csrc") / "failing_calls.c"
#: Seconds after which a run hangs; whole ones take one.
BOUND: Final = 60.0
#: Exit codes of the contract (docs/operations.md), without 1: a bug.
TYPED: Final = frozenset({0, 2, 3, 4, 5, 6, 7})
#: One in so many also begins a disk that stays full, and is followed by a run without a failure.
_SOME: Final = 4
_DISK: Final = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
#: What each call about processes and sockets can fail with.
_SYSTEM: Final = {
    "fork": (errno.EAGAIN, errno.ENOMEM), "execve": (errno.ENOENT, errno.ENOMEM),
    "pipe": (errno.EMFILE, errno.ENFILE), "socket": (errno.EMFILE, errno.ENOBUFS),
    "socketpair": (errno.EMFILE, errno.ENFILE), "bind": (errno.EADDRINUSE, errno.EACCES),
    "listen": (errno.EADDRINUSE,), "kill": (errno.EPERM, errno.ESRCH),
    "waitpid": (errno.ECHILD, errno.EINTR), "setrlimit": (errno.EPERM,),
    "memfd_create": (errno.ENOMEM,), "shm_open": (errno.EACCES,), "flock": (errno.ENOLCK,),
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """One call that fails: which of a family, by number, with which error, and whether for good."""

    calls: str
    number: int
    error: int
    stays: bool = False

    def environ(self, state: Path) -> dict[str, str]:
        """For the shim."""
        return {
            "LD_PRELOAD": str(shim()),
            "FAILING_CALLS": self.calls,
            "FAILING_UNDER": str(state),
            "FAILING_AT": str(self.number),
            "FAILING_ERRNO": str(self.error),
            "FAILING_ON": str(int(self.stays)),
            "FAILING_COUNT": str(state.with_suffix(".calls")),
        }


@dataclass
class Run:
    """How a run ended: exit code (None: it hung), what it said on stderr, processes left."""

    code: int | None
    said: str
    left: int = 0


@dataclass
class Tried:
    """A failure, the call that it hit, how the run ended, and what was wrong, if anything."""

    failure: Failure
    hit: str
    run: Run
    wrong: str


@cache
def shim() -> Path:
    """The built shim, kept under a hash of its source."""
    name = hashlib.sha256(SHIM.read_bytes()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"turbofit-failing-calls-{os.getuid()}-{name}.so"
    if not target.exists():
        half = target.with_suffix(f".{os.getpid()}")
        flags = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
        subprocess.run([*compiler(), *flags, "-o", str(half), str(SHIM)], check=True)
        half.replace(target)
    return target


def session(state: Path, environ: dict[str, str]) -> Run:
    """A whole `serve` over the stand-in engine: it opens, gets SIGTERM, ends."""
    driver = REPO / "bench" / "common" / "session_driver.py"
    options = json.dumps({"timing": {"drain": 2.0, "start": 10.0, "backoff": 0.05}})
    child = Child(
        [sys.executable, str(driver), "1xrtx3090", str(free_port()), options],
        XDG_STATE_HOME=str(state), TURBOFIT_LEASES=str(state / "leases"), STANDIN_SCRIPT="serve",
        STANDIN_COUNT=str(state.with_suffix(".starts")), FAILING_PROGRAM="session_driver",
        **environ,
    )  # fmt: skip
    try:
        # It opens, or ends by itself.
        with contextlib.suppress(AssertionError):
            child.wait_for("OPEN ", limit=BOUND)
        child.process.send_signal(signal.SIGTERM)
        code: int | None = child.finish(BOUND)
    except subprocess.TimeoutExpired:
        code = None
    left = [pid for pid in pids(child) if not gone(pid, 5.0)]
    for pid in left:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    child.kill()
    return Run(code, child.stderr, len(left))


def _command(*words: str) -> Callable[[Path, dict[str, str]], Run]:
    def run(state: Path, environ: dict[str, str]) -> Run:
        env = {**os.environ, "XDG_STATE_HOME": str(state), "FAILING_PROGRAM": "turbofit", **environ}
        argv = [sys.executable, "-m", "turbofit", *(w.format(state=state) for w in words)]
        try:
            done = subprocess.run(
                argv, env=env, cwd=REPO, capture_output=True, text=True, timeout=BOUND, check=False
            )
        except subprocess.TimeoutExpired as exc:
            return Run(None, (exc.stderr or b"").decode(errors="replace"))
        return Run(done.returncode, done.stderr)

    return run


WORKLOADS: Final[dict[str, tuple[Callable[[Path, dict[str, str]], Run], bool]]] = {
    "serve (stand-in engine)": (session, True),
    "plan": (_command("plan", "internvl2-8b", "--on", "1xrtx3090"), False),
    "report latest --html": (_command("report", "latest", "--html", "{state}/page.html"), False),
}  # fmt: skip


def failures(name: str, every: int, only: str = "") -> Iterator[Failure]:
    """All that a workload is tried with: each k-th call of each family that it makes."""
    run, launches = WORKLOADS[name]
    for calls, errors in (("files", _DISK), *(_SYSTEM.items() if launches else ())):
        if only not in calls:
            continue
        count = len(_counted(run, Failure(calls, 0, 0)))
        print(f"{name}: {count} calls of {calls}", flush=True)
        for number in range(1, count + 1, every if calls == "files" else 1):
            if calls == "files":
                yield Failure(calls, number, errors[number % len(errors)])
                if number % _SOME == 1:
                    yield Failure(calls, number, errno.ENOSPC, stays=True)
                continue
            for error in errors:
                yield Failure(calls, number, error)


def _counted(run: Callable[[Path, dict[str, str]], Run], failure: Failure) -> list[str]:
    with _state() as state:
        run(state, failure.environ(state))
        return _lines(state)


@contextlib.contextmanager
def _state() -> Iterator[Path]:
    """A state folder with what an earlier plan left in it."""
    with tempfile.TemporaryDirectory(prefix="turbofit-calls-") as name:
        state = Path(name) / "state"
        for path, data in _earlier().items():
            (state / path).parent.mkdir(parents=True, exist_ok=True)
            (state / path).write_bytes(data)
        yield state


@cache
def _earlier() -> dict[Path, bytes]:
    with tempfile.TemporaryDirectory(prefix="turbofit-calls-") as name:
        _command("plan", "internvl2-8b", "--on", "1xrtx3090")(Path(name), {})
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        return {path.relative_to(name): path.read_bytes() for path in files}


def _lines(state: Path) -> list[str]:
    path = state.with_suffix(".calls")
    return path.read_text().splitlines() if path.exists() else []


def attempt(name: str, failure: Failure) -> Tried:
    """One failure in one run, and the run after it."""
    run, _ = WORKLOADS[name]
    with _state() as state:
        ended = run(state, failure.environ(state))
        hit = next((line for line in _lines(state) if "SIMULATED" in line), "")
        short = hit.replace(str(state), "").removesuffix(" SIMULATED FAILURE")
        wrong = _wrong(ended, state) if hit else ""
        if hit and not wrong and failure.number % _SOME == 1:
            after = run(state, {})
            if after.code != 0:
                wrong = f"the run after it ended with {after.code}: {after.said[-200:]}"
    return Tried(failure, short, ended, wrong)


def _wrong(run: Run, state: Path) -> str:
    if run.code is None:
        return "hung"
    if "Traceback" in run.said:
        return f"traceback: {run.said.strip().splitlines()[-1][:200]}"
    if run.code not in TYPED:
        return f"exit {run.code}: {run.said.strip()[-200:]}"
    if run.code and not ("error: " in run.said and (" | " in run.said or "hint: " in run.said)):
        return f"exit {run.code} without cause and hint: {run.said.strip()[-200:]}"
    if run.left:
        return f"{run.left} processes left"
    half = next((path for path in state.rglob("*.json") if not _is_whole(path)), None)
    return f"{half.relative_to(state)} is half written" if half else ""


def _is_whole(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.calls", description=__doc__)
    parser.add_argument("--only", default="", help="workloads whose name has this")
    parser.add_argument("--calls", default="", help="families of calls whose name has this")
    parser.add_argument("--every", type=int, default=1, help="of files: every N-th call only")
    parser.add_argument("--results", type=Path, help="write the table into this file")
    args = parser.parse_args()
    rows: list[tuple[str, list[Tried], float]] = []
    for name in WORKLOADS:
        if args.only not in name:
            continue
        begun = time.monotonic()
        tried = []
        for failure in failures(name, args.every, args.calls):
            one = attempt(name, failure)
            tried.append(one)
            if one.wrong:
                error = errno.errorcode[failure.error]
                stays = " (stays)" if failure.stays else ""
                print(f"!! {name}: {failure.calls} {failure.number} {error}{stays} "
                      f"[{one.hit}]: {one.wrong}", flush=True)  # fmt: skip
        rows.append((name, tried, time.monotonic() - begun))
        print(
            f"{name}: {len(tried)} tried, {sum(bool(one.wrong) for one in tried)} wrong", flush=True
        )
    section = table(rows, " ".join(sys.argv[1:]))
    print(section)
    if args.results:
        args.results.write_text(section, encoding="utf-8")
    return 1 if any(one.wrong for _, tried, _ in rows for one in tried) else 0


def table(rows: list[tuple[str, list[Tried], float]], words: str) -> str:
    """What goes into the file of results."""
    every = [one for _, tried, _ in rows for one in tried]
    met = [one for one in every if one.hit]
    command = f"python -m bench.faults.calls {words}".strip()
    lines = [
        "# Each call of the system fails once",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {platform.system()}, Python "
        f"{platform.python_version()}: {len(met)} runs, in each one call that fails (or all from "
        f"it on), {sum(seconds for *_, seconds in rows) / 60:.0f} minutes. "
        f"**{sum(bool(one.wrong) for one in met)} ended as they should not.**",
        "",
        "*typed*: an exit of the contract with cause and hint. *went on*: what was wanted happened "
        "all the same. The state folder was whole after each, and the next run fine.",
        "",
        "| run | call | tried | typed | went on | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for name, tried, _ in rows:
        calls = dict.fromkeys(one.hit.partition(" ")[0] for one in tried if one.hit)
        for call in calls:
            some = [one for one in tried if one.hit.partition(" ")[0] == call]
            wrong = sum(bool(one.wrong) for one in some)
            typed = sum(not one.wrong and bool(one.run.code) for one in some)
            lines.append(f"| {name} | `{call}` | {len(some)} | {typed}"
                         f" | {len(some) - typed - wrong} | {wrong} |")  # fmt: skip
    bad = [(name, one) for name, tried, _ in rows for one in tried if one.wrong]
    lines += ["", "## Not as they should be", ""] if bad else []
    lines += [f"- {name}, `{one.hit}`: {one.wrong}" for name, one in bad]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    raise SystemExit(main())
