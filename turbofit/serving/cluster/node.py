"""The Ray actor of a node runs a `turbofit serve` there, or says why the node serves nothing.

The server and its engines end with the actor. Without its controller, the actor lives for ten
minutes, in which another controller may take the actor over. Then the actor ends itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.core.plan import Plan
from turbofit.core.process.files import state_dir, write_atomic
from turbofit.gateway.front import NodeAddress
from turbofit.serving.cluster import ray_adapter
from turbofit.serving.process.child import child

#: Why a drained node gets no plan.
DRAINED: Final = "it is drained until it leaves the cluster"
#: Seconds without a controller's call until an actor ends itself.
_ALONE: Final = 600.0
#: Seconds between two looks at the time of the last call.
_LOOK: Final = 5.0
#: Seconds without a call until the status has a warning. A controller may plan for a minute.
_SILENT: Final = 90.0


class NodeActor:
    """A Ray actor that runs the server of one node, or says why the node serves nothing.

    ``run`` is the run's name; ``words`` are further options of `turbofit serve`; ``key`` is the API
    key that fronts send to the server. ``claim`` identifies the controller's request: a
    controller with another claim does not take the actor over. Create the actor in the main thread:
    the kernel kills the server when the creating thread ends.
    """

    def __init__(
        self, run: str, planned: NodePlan, words: Sequence[str], key: str, claim: str
    ) -> None:
        """Start the node's server if the node has a plan, and wait for the controller's calls."""
        self._key, self._claim, self._planned, plan = key, claim, planned, planned.plan
        #: The time of a controller's last call.
        self._asked_at = time.monotonic()
        self._folder = state_dir(f"nodes/{run}-{planned.node[:12]}")
        self._log = self._folder / "serve.log"
        is_pretend = plan is not None and plan.machine.source != "nvml"
        cards = f"{planned.cards} (pretend)" if is_pretend else planned.cards
        self._status = NodeStatus(
            serves=run, id=planned.node, name=planned.name, address=planned.address,
            cards=cards, why_not=planned.why_not,
            state="drained" if planned.why_not == DRAINED else "unfit", folder=str(self._folder),
        )  # fmt: skip
        #: Whether this actor has ordered the end of the server.
        self._over = False
        self._server: subprocess.Popen[bytes] | None = None
        if plan is not None:
            self._change(state="starting", at_once=plan.requests_at_once, tokens=plan.kv_tokens)
            self._server = server = self._start(plan, words)
            threading.Thread(target=self._follow, args=[server], name="server", daemon=True).start()
        threading.Thread(target=self._watch, name="controller", daemon=True).start()

    def address(self) -> NodeAddress:
        """Return the node's address for fronts; the URL is empty while the server is not open."""
        return NodeAddress(name=self._status.name, url=self._status.url, key=self._key)

    def get_status(self) -> NodeStatus:
        """Return the status, with the last line of the server's log or a warning about its end."""
        silent = time.monotonic() - self._asked_at
        alone = f"no controller for {silent:.0f} s; it ends after {_ALONE:.0f} s without one"
        line = alone if silent > _SILENT else "".join(self._lines()[-1:])
        return replace(self._status, said=line)

    def keep_alive(self) -> NodeStatus:
        """Return the status to a controller; each call keeps the actor alive for ten minutes."""
        self._asked_at = time.monotonic()
        return self.get_status()

    def taken_over(self, claim: str) -> NodePlan | None:
        """Return the node's plan to a new controller; None if the controller's request is another.

        A drained node stays drained.
        """
        same = claim == self._claim and self._status.state != "unfit"
        return self._planned if same else None

    def end(self) -> None:
        """End the server normally."""
        self._over = True
        if self._server is None or self._server.poll() is not None:
            self._change(state="drained", url="")
        else:
            self._change(state="draining", url="")
            self._server.terminate()

    def _change(self, **facts: Any) -> None:
        self._status = replace(self._status, **facts)

    def _start(self, plan: Plan, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start the node's `turbofit serve`, with the plan and the key in files."""
        folder = self._folder
        write_atomic(folder / "plan.json", plan.to_json(), mode=0o600)
        write_atomic(folder / "key", self._key, mode=0o600)
        argv = [
            sys.executable, "-m", "turbofit", "serve", "--plan", f"{folder}/plan.json",
            "--host", self._status.address, "--front-key-file", f"{folder}/key", *words,
        ]  # fmt: skip
        # With Ray's variables, LMDeploy's PyTorch engine would join this cluster and wait for GPUs.
        # RAY_ADDRESS=local makes the engine start a Ray cluster of its own.
        environ = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
        if plan.machine.source != "nvml":  # each pretend node has leases of its own
            environ["TURBOFIT_LEASES"] = f"{folder}/cards/leases"
        with self._log.open("wb") as log:
            return child(argv, environ | {"RAY_ADDRESS": "local"}, stderr=log, cwd=folder)

    def _follow(self, server: subprocess.Popen[bytes]) -> None:
        """Wait for the server to open and to end, and change the node's status accordingly.

        A server that has ended is not started again.
        """
        assert server.stdout is not None
        with server.stdout:
            url = server.stdout.readline().decode().strip()
            if url and not self._over:
                self._change(state="serving", url=url)
            server.wait()
        errors = [line for line in self._lines() if line.startswith("error: ")]
        why = "".join(errors[-1:]).removeprefix("error: ") or "its turbofit serve has ended"
        if self._over:
            self._change(state="drained")
        else:
            self._change(state="unfit", url="", why_not=why)

    def _watch(self) -> None:
        """Wait for ten minutes without a controller's call, then end the server and the actor."""
        while time.monotonic() - self._asked_at < _ALONE:
            time.sleep(_LOOK)
        self._change(state="unfit", url="", why_not="its controller has ended")
        if self._server is not None:
            self._server.terminate()
            self._server.wait()
        ray_adapter.kill_actor()

    def _lines(self) -> list[str]:
        """Return the lines of the server's log; empty if the log cannot be read."""
        try:
            return self._log.read_text(errors="replace").splitlines()
        except OSError:
            return []
