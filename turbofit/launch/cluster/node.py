"""The Ray actor of a node: it starts a `turbofit serve` there, and adopts one that runs already.

Files in the node's state folder inform the next actor, if Ray starts this one again:
``wanted.json`` names the plan that is to run; ``lock`` names the plan that runs, and the server's
processes hold it locked; a plan's server serves as long as its ``lease-…`` exists and is renewed.
So no request is lost when the actor dies, and no server lives on without an actor.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.process.files import StateFile, state_dir, write_atomic
from turbofit.core.struct import Struct
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.nodes import held_only, measure_here, node_of, raylet_environment
from turbofit.launch.cluster.ray_adapter import server_words
from turbofit.launch.serve.leases import is_held

_TICK: Final = 0.25
#: A shell's exit code is larger than this if a signal ended the process.
_SIGNALLED: Final = 128
_LAST_BYTES: Final = 4096
#: A worker of Ray that ends normally kills its children. So the server is a grandchild, and the
#: shell between them writes its exit code down.
_BETWEEN: Final = '"$@"; echo $? > code'


class NodeReport(Struct):
    """A node's report of itself: ``state`` is ``idle``, ``starting``, ``open`` or ``unfit``.

    ``state`` is empty until the actor has looked: the server of an earlier actor may be open.
    ``measured`` is the node with the actor's GPUs, while nothing serves. ``digest`` is that of the
    running plan, ``exit_code`` that of its server, 0 if a signal ended it.
    """

    state: str = "idle"
    measured: Node | None = None
    digest: str = ""
    url: str = ""
    key: str = ""
    last_line: str = ""
    why: str = ""
    exit_code: int = 0
    folder: str = ""


class _Wanted(Struct, tag_field="schema", tag="turbofit.wanted/2"):
    """The plan that a node must serve; without this file it serves nothing."""

    digest: str = ""
    words: tuple[str, ...] = ()


class NodeActor:
    """Keeps a server of the service ``name`` on this node."""

    def __init__(self, name: str, node: Node, port: int, pretend: bool) -> None:
        room = f"nodes/{name}-{node.id[:12]}"
        self._folder, self._wanted = state_dir(room), StateFile(room, "wanted", _Wanted)
        self._node, self._port, self._pretend = node, port, pretend
        self._raylet, self._gpus = os.getppid(), ray_adapter.gpus_of_this_task()
        self._child: subprocess.Popen[bytes] | None = None
        self._report = NodeReport(
            state="", folder=str(self._folder), key=_text(self._folder / "key")
        )
        self._gone = threading.Event()
        # Ray starts its workers at a niceness of 15, which engines would inherit from this thread.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        threading.Thread(target=self._live, name="life", daemon=True).start()

    def serve(self, digest: str, plan: str, words: tuple[str, ...]) -> None:
        """Serve this plan from now on; a server with another plan ends normally."""
        key = self._folder / "key"
        if not key.exists():
            write_atomic(key, secrets.token_hex(32) + "\n", mode=0o600)
        write_atomic(self._folder / f"plan-{digest}.json", plan, mode=0o600)
        self._note(state="starting", digest=digest, url="", why="", exit_code=0, key=_text(key))
        self._wanted.write(_Wanted(digest=digest, words=words))

    def end(self) -> None:
        """End the server normally, also on a full disk, and start no other; drops the key, too."""
        self._wanted.forget()
        self._keep_lease("")
        (self._folder / "key").unlink(missing_ok=True)

    def tell(self) -> NodeReport:
        return self._report

    def _note(self, **facts: Any) -> None:
        self._report = replace(self._report, **facts)

    def _live(self) -> None:
        with (self._folder / "actor").open("wb") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)  # the last actor may be about to end
            while not self._gone.wait(_TICK):
                if os.getppid() != self._raylet:
                    # Ray ends this process too, if its raylet was reaped: the node has left the
                    # cluster.
                    self._keep_lease("")
                    os._exit(1)
                try:
                    self._look()
                except Exception as exc:  # noqa: BLE001 - this thread must not end
                    state, why = self._report.state or "idle", f"{type(exc).__name__}: {exc}"
                    self._note(state=state, why=why)

    def _look(self) -> None:
        wanted = self._wanted.read() or _Wanted()
        digest, runs = wanted.digest, _text(self._folder / "lock")
        self._keep_lease(digest)
        if self._child is not None:
            self._child.poll()  # a dead child is reaped
        if is_held(self._folder / "lock"):  # a server writes its exit code before the lock ends
            if runs == digest:
                url = _text(self._folder / "url").partition("\n")[0]
                last_line = "".join(self._lines()[-1:])
                state = "open" if url else "starting"
                self._note(state=state, digest=digest, url=url, last_line=last_line)
        elif runs:
            if runs == digest:
                self._ended(digest)
            (self._folder / "lock").write_text("")
        elif not digest:
            self._note(state="idle", digest="", url="", why="")
            # Measured at each look: the driver frees a server's memory only some time later.
            measured = node_of(self._node, measure_here(pretend=self._pretend))
            self._note(measured=held_only(measured, self._gpus))
        elif (self._report.state, self._report.digest) != ("unfit", digest):
            self._start(wanted)

    def _keep_lease(self, digest: str) -> None:
        """Renew the lease of a plan's server; servers without a lease end normally."""
        for lease in self._folder.glob("lease-*"):
            if lease.name != f"lease-{digest}":
                lease.unlink(missing_ok=True)  # `end` is called in another thread than `_look`
        if digest:
            (self._folder / f"lease-{digest}").touch(mode=0o600)

    def _ended(self, digest: str) -> None:
        code = int(_text(self._folder / "code") or 0)
        code = 0 if code > _SIGNALLED else code
        errors = [line for line in self._lines() if line.startswith("error: ")]
        why = "".join(errors[-1:]).removeprefix("error: ") or f"turbofit serve ended with {code}"
        self._note(
            state="unfit", digest=digest, url="", exit_code=code,
            why=why if code else "its turbofit serve has ended",
        )  # fmt: skip

    def _start(self, wanted: _Wanted) -> None:
        folder, digest = self._folder, wanted.digest
        argv = [
            "/bin/sh", "-c", _BETWEEN, "sh", sys.executable, "-m", "turbofit", "serve",
            "--plan", f"{folder}/plan-{digest}.json", "--host", self._node.address,
            "--port", str(self._port), "--front-key-file", f"{folder}/key",
            "--lease", f"{folder}/lease-{digest}", *server_words(os.environ), *wanted.words,
        ]  # fmt: skip
        env = _environment()
        if self._pretend:  # another node of this host may pretend to have the same cards
            env["TURBOFIT_LEASES"] = f"{folder}/leases"
        with suppress(OSError):
            os.replace(folder / "serve.log", folder / "serve.log.1")
        (folder / "code").unlink(missing_ok=True)
        with (
            (folder / "lock").open("w") as lock,
            (folder / "serve.log").open("wb") as log,
            (folder / "url").open("wb") as url,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(digest)
            lock.flush()
            self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=url, stderr=log, env=env,
                cwd=folder, start_new_session=True, pass_fds=[lock.fileno()],
            )  # fmt: skip
        self._note(state="starting", url="", digest=digest, last_line="", measured=None)

    def _lines(self) -> list[str]:
        with suppress(OSError), (self._folder / "serve.log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
            return [line.strip() for line in text.splitlines() if line.strip()]
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _environment() -> dict[str, str]:
    """The environment for a server.

    Ray shows an actor only its own GPUs, while a plan names GPUs by UUID. An engine that finds
    Ray's variables, or a cluster on this host, would join that cluster and wait there for GPUs that
    are reserved for it: LMDeploy's PyTorch engine must start a Ray of its own instead.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shown = raylet_environment().get("CUDA_VISIBLE_DEVICES")
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    if shown is not None:
        environ["CUDA_VISIBLE_DEVICES"] = shown
    return environ | {"RAY_ADDRESS": "local"}
