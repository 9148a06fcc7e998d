"""The Ray actor of a node: it keeps a `turbofit serve` there, and adopts one that runs already.

The server's lease is a file in the node's state folder, ``lease-…`` with a digest of what it serves
and of its key. The server's processes hold it locked and write their URL into it; it serves as long
as the file is there and the controller has it renewed. So no request is lost when the actor dies
and Ray starts it again, and no server lives on when the controller has gone. A file ``drained``
says that nothing may serve there any more.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.core.process.files import state_dir, write_atomic
from turbofit.gateway.front import NodeAddress
from turbofit.gateway.server import digest_of
from turbofit.serving.cluster import ray_adapter
from turbofit.serving.detached import LEASE_SECONDS, NODE_LEASE
from turbofit.serving.leases import is_held

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TICK: Final = 0.25
#: A worker of Ray that ends normally kills its children, so the server is a grandchild.
_BETWEEN: Final = '"$@"; exit'


def served_digest(planned: NodePlan, words: Sequence[str]) -> str:
    """It is equal for nodes that serve alike, or serve nothing for the same reason."""
    served = planned.why_not if planned.plan is None else digest_of(planned.plan)
    return sha256(f"{served} {words}".encode()).hexdigest()[:16]


class NodeActor:
    """Keeps the server of a node in the run ``run``, or says why it has none.

    ``words`` are further options of its `turbofit serve`, and fronts show ``key``.
    """

    def __init__(self, run: str, planned: NodePlan, words: Sequence[str], key: str) -> None:
        self._planned, self._words, self._key, plan = planned, words, key, planned.plan
        self._folder = folder = state_dir(f"nodes/{run}-{planned.node[:12]}")
        server = f"{served_digest(planned, words)} {key}".encode()
        self._lease = folder / f"lease-{sha256(server).hexdigest()[:16]}"
        self._over, self._raylet = plan is None, os.getppid()
        # It has half of the time to hear of its controller, and is not taken for one that has.
        self._renewed = time.monotonic() - LEASE_SECONDS / 2
        self._child: subprocess.Popen[bytes] | None = None
        pretend = plan is not None and plan.machine.source != "nvml"
        self._status = NodeStatus(
            serves=run, id=planned.node, name=planned.name, address=planned.address,
            cards=planned.cards + " (pretend)" * pretend, state="starting",
            why_not=planned.why_not, at_once=0 if plan is None else plan.requests_at_once,
            tokens=0 if plan is None else plan.kv.total_tokens, folder=str(folder),
        )  # fmt: skip
        self._alive = (folder / "actor").open("wb")
        fcntl.flock(self._alive, fcntl.LOCK_EX)  # the last actor may be about to end
        threading.Thread(target=self._live, name="life", daemon=True).start()

    def made(self) -> tuple[NodePlan, str]:
        """What it serves: the plan, and the digest of that with the further options."""
        return self._planned, served_digest(self._planned, self._words)

    def address(self) -> NodeAddress:
        """Where fronts reach the node; it has no URL while its server is not open."""
        return NodeAddress(name=self._status.name, url=self._status.url, key=self._key)

    def tell(self, renew: bool = False) -> NodeStatus:
        """The node's status; a controller has the server's lease renewed."""
        silent = time.monotonic() - self._renewed
        if renew:
            self._renewed = time.monotonic()
            with suppress(FileNotFoundError):
                os.utime(self._lease)
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
        except Exception:  # noqa: BLE001 - Ray keeps what it prints
            traceback.print_exc()
        finally:
            os._exit(1)  # the next actor goes on, if there is one

    def _look(self) -> None:
        drained = (self._folder / "drained").exists()
        over, why = self._over or drained, self._status.why_not
        if self._child is not None:
            self._child.poll()  # a dead child is reaped
        held = self._held(over)
        lines, url = _text(self._folder / "serve.log").splitlines(), ""
        if held and not over and self._lease in held:
            url = _text(self._lease).partition("\n")[0]
            state = "serving" if url else "starting"
        elif held:
            state = "draining"
        elif over:
            state = "unfit" if why and not drained else "drained"
        elif self._lease.exists():  # its server has ended, and is not started again
            self._over, state = True, "unfit"
            errors = [line for line in lines if line.startswith("error: ")]
            why = "".join(errors[-1:]).removeprefix("error: ") or "its turbofit serve has ended"
        else:
            state = "starting"
            self._start()
        self._status = replace(
            self._status, state=state, url=url, why_not=why, said="".join(lines[-1:])
        )

    def _held(self, over: bool) -> list[Path]:
        """The leases that servers hold; without its lease a server ends normally."""
        held = [path for path in self._folder.glob("*-*") if is_held(path)]
        for path in self._folder.glob("*-*"):
            if over or path != self._lease:
                ended = path.with_name(path.name.replace("lease", "ended"))
                path.rename(ended) if path in held else path.unlink()
        return held

    def _start(self) -> None:
        folder, plan = self._folder, self._planned.plan
        assert plan is not None
        write_atomic(folder / "plan.json", plan.to_json(), mode=0o600)
        write_atomic(folder / "key", self._key, mode=0o600)
        argv = [
            "/bin/sh", "-c", _BETWEEN, "sh", sys.executable, "-m", "turbofit", "serve",
            "--plan", f"{folder}/plan.json", "--host", self._planned.address,
            "--front-key-file", f"{folder}/key",
            *ray_adapter.server_words(os.environ), *self._words,
        ]  # fmt: skip
        # An engine that finds Ray's variables, or a cluster on this host, would join that cluster
        # and wait there for GPUs: LMDeploy's PyTorch engine must start a Ray of its own instead.
        environ = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
        if plan.machine.source != "nvml":  # another node of this host may pretend to have the cards
            environ["TURBOFIT_LEASES"] = f"{folder}/cards/leases"
        with (folder / "serve.log").open("wb") as log, self._lease.open("wb") as lease:
            fcntl.flock(lease, fcntl.LOCK_EX)
            self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=lease, stderr=log, cwd=folder,
                env=environ | {"RAY_ADDRESS": "local", NODE_LEASE: str(self._lease)},
                start_new_session=True,
            )  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
