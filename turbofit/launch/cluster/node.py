"""The Ray actor of a node: it keeps a `turbofit serve` there, and adopts one that runs already.

Files in the node's state folder inform the next actor, if Ray starts this one again: ``lock`` names
what runs, and the server's processes hold it locked; the server serves as long as its ``lease-…``
exists and the controller has it renewed; ``drained`` says that nothing may serve. So no request is
lost when the actor dies, and no server lives on when the controller has gone.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.core.process.files import state_dir, write_atomic
from turbofit.core.struct import Struct
from turbofit.gateway.front import NodeAddress
from turbofit.gateway.server import digest_of
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.serve.detached import LEASE_SECONDS
from turbofit.launch.serve.leases import is_held

if TYPE_CHECKING:
    from pathlib import Path

_TICK: Final = 0.25
#: A worker of Ray that ends normally kills its children, so the server is a grandchild.
_BETWEEN: Final = '"$@"; exit'


class Wanted(Struct):
    """What a node is to serve, or why it serves nothing.

    ``words`` are further options of its `turbofit serve`, and fronts show ``key``.
    """

    planned: NodePlan
    words: tuple[str, ...]
    key: str

    @property
    def digest(self) -> str:
        """It is equal for what is served alike; each server has a key of its own."""
        planned = self.planned
        served = planned.why_not if planned.plan is None else digest_of(planned.plan)
        return sha256(f"{served} {self.words}".encode()).hexdigest()[:16]


class NodeActor:
    """Keeps the server of a node in the run ``run``, or says why it has none."""

    def __init__(self, run: str, wanted: Wanted) -> None:
        planned, plan = wanted.planned, wanted.planned.plan
        self._wanted, self._over, self._renewed = wanted, plan is None, time.monotonic()
        self._folder = folder = state_dir(f"nodes/{run}-{planned.node[:12]}")
        self._mark, self._raylet = f"{wanted.digest}-{wanted.key[:8]}", os.getppid()
        self._child: subprocess.Popen[bytes] | None = None
        pretend = plan is not None and plan.machine.source != "nvml"
        self._status = NodeStatus(
            id=planned.node, name=planned.name, address=planned.address, state="starting",
            cards=planned.cards + " (pretend)" * pretend, why_not=planned.why_not,
            at_once=0 if plan is None else plan.requests_at_once,
            tokens=0 if plan is None else plan.kv.total_tokens, folder=str(folder),
        )  # fmt: skip
        self._alive = (folder / "actor").open("wb")
        fcntl.flock(self._alive, fcntl.LOCK_EX)  # the last actor may be about to end
        threading.Thread(target=self._live, name="life", daemon=True).start()

    def wanted(self) -> Wanted:
        return self._wanted

    def address(self) -> NodeAddress:
        """Where fronts reach the node; it has no URL while its server is not open."""
        status = self._status
        return NodeAddress(name=status.name, url=status.url, key=self._wanted.key)

    def tell(self, renew: bool = False) -> NodeStatus:
        """The node's status; a controller has the server's lease renewed."""
        silent = time.monotonic() - self._renewed
        if renew:
            self._renewed = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(self._folder / f"lease-{self._mark}")
        return replace(self._status, silent=silent)

    def end(self, drained: bool = False) -> None:
        """End the server normally, and start no other; ``drained``: nor may a later actor."""
        if drained:
            (self._folder / "drained").touch()
        self._over = True

    def _live(self) -> None:
        try:
            while os.getppid() == self._raylet:
                self._look()
                silent = time.monotonic() - self._renewed
                if silent > LEASE_SECONDS and self._status.state in ("drained", "unfit"):
                    ray_adapter.kill_actor()
                time.sleep(_TICK)
            self._over = True  # the node has left the cluster
            self._look()
        finally:
            os._exit(1)  # the next actor goes on, if there is one

    def _look(self) -> None:
        folder = self._folder
        drained, runs = (folder / "drained").exists(), _text(folder / "lock")
        mark = "" if self._over or drained else self._mark
        for lease in folder.glob("lease-*"):
            if lease.name != f"lease-{mark}":
                lease.unlink(missing_ok=True)  # servers without a lease end normally
        if self._child is not None:
            self._child.poll()  # a dead child is reaped
        lines = _text(folder / "serve.log").splitlines()
        if is_held(folder / "lock"):
            url = _text(folder / "url").partition("\n")[0]
            state = "draining" if runs != mark else "serving" if url else "starting"
            self._note(state=state, url=url, said="".join(lines[-1:]))
        elif mark and runs == mark:  # it has ended, and is not started again
            self._over = True
            (folder / "lock").write_text("")
            errors = [line for line in lines if line.startswith("error: ")]
            why = "".join(errors[-1:]).removeprefix("error: ")
            self._note(state="unfit", url="", why_not=why or "its turbofit serve has ended")
        elif mark:
            self._start()
        else:
            state = "unfit" if self._status.why_not and not drained else "drained"
            self._note(state=state, url="")

    def _note(self, **facts: Any) -> None:
        self._status = replace(self._status, **facts)

    def _start(self) -> None:
        folder, wanted, plan = self._folder, self._wanted, self._wanted.planned.plan
        assert plan is not None
        write_atomic(folder / "plan.json", plan.to_json(), mode=0o600)
        write_atomic(folder / "key", wanted.key, mode=0o600)
        lease = folder / f"lease-{self._mark}"
        lease.touch(mode=0o600)
        argv = [
            "/bin/sh", "-c", _BETWEEN, "sh", sys.executable, "-m", "turbofit", "serve",
            "--plan", f"{folder}/plan.json", "--host", wanted.planned.address,
            "--front-key-file", f"{folder}/key", "--lease", str(lease),
            *ray_adapter.server_words(os.environ), *wanted.words,
        ]  # fmt: skip
        # An engine that finds Ray's variables, or a cluster on this host, would join that cluster
        # and wait there for GPUs: LMDeploy's PyTorch engine must start a Ray of its own instead.
        environ = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
        with (
            (folder / "lock").open("w") as lock,
            (folder / "serve.log").open("wb") as log,
            (folder / "url").open("wb") as url,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(self._mark)
            lock.flush()
            self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=url, stderr=log, cwd=folder,
                env=environ | {"RAY_ADDRESS": "local"}, start_new_session=True,
                pass_fds=[lock.fileno()],
            )  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
