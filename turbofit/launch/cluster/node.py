"""The Ray actor of a node: it keeps one `turbofit serve` there, and adopts one that runs already.

A file in the node's state folder names the plan that is to run, so that an actor which Ray starts
again goes on where the last one ended. The server depends on a lease that the actor renews, and not
on the actor: when the actor dies, no request is lost. The server's processes inherit a lock, which
tells whether the server runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.process.files import write_atomic
from turbofit.core.process.state import state_dir
from turbofit.core.struct import Struct
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.nodes import measure_here, raylet_environment
from turbofit.launch.cluster.ray_adapter import server_words

if TYPE_CHECKING:
    from pathlib import Path

_TICK: Final = 0.25
#: Pauses before it starts again what somebody killed, within ten minutes.
_PAUSES: Final = (1.0, 4.0, 10.0)
_WINDOW: Final = 600.0
_DOES_NOT_FIT: Final = 3
#: A shell's exit code is larger where a signal ended the process.
_SIGNALLED: Final = 128
_LAST_BYTES: Final = 4096
#: A worker of Ray that ends in order kills its children. So the server is a grandchild. The shell
#: between them writes down the server's exit code; a second one, which becomes the server, its
#: process id and plan, so that no server lives which nobody can end.
_BETWEEN: Final = '/bin/sh -c "$@" & wait $!; echo $? > code'
_BECOME: Final = 'echo $$ $0 > pid.new; mv pid.new pid; exec "$@"'
#: Seconds after which Ray starts no actor again that died, and that its server then has to end.
_BACK_SECONDS: Final = 10.0
_LEFT_SECONDS: Final = 60.0
#: Folders of earlier runs, with their logs, are kept for so long.
_KEPT_SECONDS: Final = 7 * 86400.0


class NodeReport(Struct):
    """What a node tells of itself: ``state`` is ``idle``, ``starting``, ``open`` or ``unfit``.

    ``digest`` is of the plan that runs; ``why`` and ``exit_code`` say why the node is unfit.
    """

    state: str = "idle"
    digest: str = ""
    url: str = ""
    key: str = ""
    pid: int = 0
    last_line: str = ""
    why: str = ""
    exit_code: int = 0
    folder: str = ""


class NodeActor:
    """Keeps a server."""

    def __init__(self, run: str, node: str, host: str, port: int) -> None:
        self._folder = state_dir("nodes") / f"{run}-{node[:12]}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._host, self._port, self._raylet = host, port, os.getppid()
        self._child: subprocess.Popen[bytes] | None = None
        key = self._folder / "key"  # the server trusts fronts by it; random for each folder
        if not _text(key):
            write_atomic(key, secrets.token_hex(32) + "\n", mode=0o600)
        self._report = NodeReport(folder=str(self._folder), key=_text(key))
        self._ends: list[float] = []
        self._again, self._tried = 0.0, ""
        self._gone = threading.Event()
        # Ray starts its workers at a niceness of 15, which engines would have from this thread.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        threading.Thread(target=self._live, name="life", daemon=True).start()

    def measure(self, pretend: bool) -> tuple[bytes, list[str]]:
        """The node as it is now, as JSON, and Ray's ids of the GPUs that this actor has.

        A server that an earlier run left here without an actor is ended first.
        """
        node = self._folder.name.rpartition("-")[2]
        for folder in state_dir("nodes").iterdir():
            if not _is_held(folder / "lock"):
                _forget(folder)
            elif folder.name.endswith(node) and not _within(_BACK_SECONDS, folder / "actor"):
                _end_server(folder)
                _within(_LEFT_SECONDS, folder / "lock", locked=False)
        return measure_here(pretend), ray_adapter.gpus_of_this_task()

    def serve(self, digest: str, plan: str, words: tuple[str, ...]) -> None:
        """Serve this plan from now on; a server with another plan is ended in order."""
        write_atomic(self._folder / f"plan-{digest}.json", plan, mode=0o600)
        write_atomic(self._folder / "wanted.json", json.dumps([digest, words]), mode=0o600)
        self._ends, self._again, self._tried = [], 0.0, ""
        self._report = replace(self._report, state="starting", why="", exit_code=0)

    def end(self) -> None:
        """End the server in order, and start none."""
        (self._folder / "wanted.json").unlink(missing_ok=True)

    def tell(self) -> NodeReport:
        """What the node tells of itself now."""
        return self._report

    def _live(self) -> None:
        with (self._folder / "actor").open("wb") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)  # the last actor may be about to end
            while not self._gone.wait(_TICK):
                if os.getppid() != self._raylet:
                    # Ray ends this process too, if its raylet was reaped: the node has left.
                    _end_server(self._folder)
                    os._exit(1)
                try:
                    self._look()
                except Exception as exc:  # noqa: BLE001 - this thread must not end
                    self._report = replace(self._report, why=f"{type(exc).__name__}: {exc}")

    def _look(self) -> None:
        now = time.monotonic()
        (self._folder / "lease").touch(mode=0o600)
        if self._child is not None:
            self._child.poll()  # a dead child is reaped
        digest, words = json.loads(_text(self._folder / "wanted.json") or '["", []]')
        pid, serves = _server(self._folder)
        if _is_held(self._folder / "lock"):
            if serves != digest:
                _end_server(self._folder)
                return
            url, last_line = self._url(), "".join(self._lines()[-1:])
            state = "open" if url else "starting"
            self._report = replace(
                self._report, state=state, url=url, pid=pid, digest=digest, last_line=last_line
            )
        elif pid:
            self._ended(serves, digest, now)
        elif not digest:
            self._report = replace(self._report, state="idle", url="", digest="")
        elif self._tried != digest and now >= self._again:
            self._start(digest, words)

    def _ended(self, served: str, digest: str, now: float) -> None:
        """The server's process is gone: it is started again, unless that would not help."""
        text = _text(self._folder / "code")
        code, was_open, self._child = int(text) if text else None, bool(self._url()), None
        (self._folder / "pid").unlink()
        self._report = replace(self._report, url="", pid=0)
        if served != digest:
            return
        self._ends = [at for at in self._ends if now - at < _WINDOW] + [now]
        helps = not code or code > _SIGNALLED or was_open
        if code == _DOES_NOT_FIT:
            helps = len(self._ends) > 1  # beside what the driver still holds of a killed one
        if not helps or len(self._ends) > len(_PAUSES):
            self._tried = digest
            errors = [line for line in self._lines() if line.startswith("error: ")]
            error = "".join(errors[-1:]).removeprefix("error: ")
            why = error or f"turbofit serve ended with {code}"
            self._report = replace(
                self._report, state="unfit", digest=digest, why=why, exit_code=code or 0
            )
            return
        # What the driver still holds of a killed one's memory comes back meanwhile.
        self._again = now + _PAUSES[len(self._ends) - 1]
        self._report = replace(self._report, state="starting")

    def _start(self, digest: str, words: list[str]) -> None:
        folder = self._folder
        argv = [
            "/bin/sh", "-c", _BETWEEN, "sh", _BECOME, digest,
            sys.executable, "-m", "turbofit", "serve", "--plan", f"{folder}/plan-{digest}.json",
            "--host", self._host, "--port", str(self._port), "--front-key-file",
            f"{folder}/key", "--lease", f"{folder}/lease", *server_words(os.environ), *words,
        ]  # fmt: skip
        with suppress(OSError):
            os.replace(folder / "serve.log", folder / "serve.log.1")
        for name in ("code", "ending"):
            (folder / name).unlink(missing_ok=True)
        with (
            (folder / "lock").open("wb") as lock,
            (folder / "serve.log").open("wb") as log,
            (folder / "url").open("wb") as url,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=url, stderr=log, env=_environment(),
                cwd=folder, start_new_session=True, pass_fds=[lock.fileno()],
            )  # fmt: skip
        self._report = replace(self._report, state="starting", url="", digest=digest, last_line="")

    def _url(self) -> str:
        return _text(self._folder / "url").partition("\n")[0]

    def _lines(self) -> list[str]:
        with suppress(OSError), (self._folder / "serve.log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
            return [line.strip() for line in text.splitlines() if line.strip()]
        return []


def _text(path: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _server(folder: Path) -> tuple[int, str]:
    """The process and the plan of the server that a folder has or had; 0 before it began."""
    pid, _, digest = _text(folder / "pid").partition(" ")
    return int(pid or 0), digest


def _is_held(path: Path) -> bool:
    """Whether what locks this file lives: a folder's ``actor``, or its server by its ``lock``.

    The server's exit code is written down before the lock ends.
    """
    with suppress(FileNotFoundError), path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _within(seconds: float, path: Path, *, locked: bool = True) -> bool:
    """Whether a lock is held, or is no more, within so many seconds."""
    until = time.monotonic() + seconds
    while _is_held(path) != locked and time.monotonic() < until:
        time.sleep(_TICK)
    return _is_held(path) == locked


def _end_server(folder: Path) -> None:
    """Ask a server to end in order, once: a second signal would cut off what is open."""
    pid, _ = _server(folder)
    if pid and not (folder / "ending").exists():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        (folder / "ending").touch()


def _forget(folder: Path) -> None:
    """Remove what an earlier run has left, its key too, after some days."""
    with suppress(OSError):
        if time.time() - (folder / "lease").stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """The environment that a server may be started from.

    Ray shows an actor its own GPUs alone, and a plan names GPUs by UUID. And an engine that finds
    Ray's variables, or a cluster on this host, would join that cluster and wait there for GPUs that
    are reserved for itself: LMDeploy's PyTorch engine begins a Ray of its own instead.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shown = raylet_environment().get("CUDA_VISIBLE_DEVICES")
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    if shown is not None:
        environ["CUDA_VISIBLE_DEVICES"] = shown
    return environ | {"RAY_ADDRESS": "local"}
