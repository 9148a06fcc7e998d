"""A Ray cluster on this host whose nodes pretend to be machines, what it serves, and clients."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.processes import HANG, REPO, STANDIN, Child, free_port
from tests.support.waiting import until

#: What clients of the fronts show.
KEY = "secret"
#: The driver and Ray's own processes find each other by these; no token, no dashboard. Ray's own
#: deadlines for what a machine under load starts: only what hangs reaches these.
RAY = {
    "RAY_AUTH_MODE": "disabled", "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600", "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_gcs_server_port_wait_time_s": "600",
}  # fmt: skip
#: In the place of engines of nodes: a server without LMDeploy, as fast as these are.
STAND_IN = {"PYTHONPATH": f"{STANDIN}:{REPO}", "STANDIN_PACE": "0.02", "STANDIN_FREE": "100000"}


class Cloud:
    """Nodes of one Ray cluster, each with pretend GPUs; ``environ`` is of everything on them."""

    def __init__(self, **environ: str) -> None:
        from ray.cluster_utils import Cluster  # it takes a second, of each worker that collects

        os.environ.update(RAY)
        self.environ = environ
        #: Ray puts its own in its place and leaves it there.
        self._sigterm = signal.getsignal(signal.SIGTERM)
        # `turbofit` takes no logs from Ray and asks it for no more nodes.
        without = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        head = {"num_cpus": 0, "num_gpus": 0, "env_vars": {**RAY, **environ}, **without}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, Any] = {}

    @property
    def address(self) -> str:
        """For ``--cluster``."""
        return f"ray:{self._cluster.address}"

    def add(self, name: str, spec: str, gpus: int) -> None:
        environ = {"TURBOFIT_NODE_SPEC": spec, **RAY, **self.environ}
        self.nodes[name] = self._cluster.add_node(
            num_cpus=0, num_gpus=gpus, wait=False, env_vars=environ
        )
        self._cluster.wait_for_nodes(HANG)

    def identity(self, name: str) -> str:
        return str(self.nodes[name].node_id)

    def kill(self, name: str) -> None:
        """The node's raylet dies: what it started has to go by itself."""
        node = self.nodes.pop(name)
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # whoever started it reaps it, or its processes never see that it has gone
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, name: str) -> None:
        """What ``ray drain-node`` does, for an hour."""
        words = ["--address", self._cluster.address, "--node-id", self.identity(name)]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        ray = str(Path(sys.executable).with_name("ray"))
        words += ["--deadline-remaining-seconds", "3600"]
        subprocess.run([ray, "drain-node", *words], check=True, capture_output=True)

    def stop(self) -> None:
        self._cluster.shutdown()
        signal.signal(signal.SIGTERM, self._sigterm)


class Serving:
    """``turbofit serve --cluster --pretend`` in a process, with another front before its nodes.

    Clients show `KEY` to ``port``, the other front's: it outlives a controller that is killed.
    ``own`` is the port of the controller's own front.
    """

    def __init__(self, cloud: Cloud, state: Path, *words: str) -> None:
        self.cloud, self.state, self.port, self.own = cloud, state, free_port(), free_port()
        self.children: list[Child] = []
        # That the worst requests are answered before a server opens is tested alone; so are
        # standbys.
        self._words = [
            "serve", "internvl2-2b", "--pretend", "--port", str(self.own), "--drain", "60",
            "--check", "none", "--no-standby", "--api-key", KEY, *words,
        ]  # fmt: skip
        self.child = self.again()
        self.child.wait_for(": starting")  # the first actor of a node
        self.run("gateway", "--port", str(self.port), "--api-key", KEY, "--access-log", "none")

    def run(self, *words: str) -> Child:
        argv = [sys.executable, "-m", "turbofit", *words, "--cluster", self.cloud.address]
        environ = {"XDG_STATE_HOME": str(self.state), **self.cloud.environ}
        self.children.append(Child(argv, standin=False, **environ))
        return self.children[-1]

    def again(self, *words: str) -> Child:
        """Start the controller, with further words."""
        self.child = self.run(*self._words, *words)
        return self.child

    def kill(self) -> None:
        """Kill the controller, and with it its own front."""
        self.child.process.kill()
        self.child.process.wait()

    def cli(self, *words: str) -> tuple[int, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "turbofit", *words, "--cluster", self.cloud.address, "--json"],
            env={**os.environ, "XDG_STATE_HOME": str(self.state)}, capture_output=True, text=True,
            timeout=HANG, check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    def status(self) -> dict[str, dict[str, Any]]:
        """What `cluster status` tells of each node, by our name of it."""
        code, served = self.cli("cluster", "status")
        nodes = {node["id"]: node for node in served} if code == 0 else {}
        ours = {name: self.cloud.identity(name) for name in self.cloud.nodes}
        return {name: nodes[identity] for name, identity in ours.items() if identity in nodes}

    def state_of(self, name: str) -> str:
        """What a node does; empty while its actor does not answer."""
        return str(self.status().get(name, {}).get("state", ""))

    def up(self) -> set[str]:
        """The nodes to which the front sends requests, by our names."""
        try:
            text = ask(self.port, "/metrics")[1].decode()
        except OSError:
            return set()
        ids = set(re.findall(r'engine_up\{engine="[^"]*-(\w{6})"\} 1', text))
        return {name for name in self.cloud.nodes if self.cloud.identity(name)[:6] in ids}

    def wait(self, *nodes: str) -> None:
        """Wait until the front has these nodes, and no other."""
        until(lambda: self.up() == set(nodes), f"{nodes}, {self.up()}: {self.child.stderr[-3000:]}")

    def folder(self, name: str) -> Path:
        (found,) = (self.state / "turbofit" / "nodes").glob(f"*-{self.cloud.identity(name)[:12]}")
        return found

    def server(self, name: str) -> int:
        """The process of the node's `turbofit serve`; 0 while there is none."""
        plan = f"{self.folder(name)}/plan.json".encode()
        return sum(found(plan, lambda pid: b"guard.py" not in command(pid))[:1])

    def servers(self) -> list[int]:
        """The processes of the nodes' `turbofit serve`, in the order of nodes."""
        return [self.server(name) for name in self.cloud.nodes]

    def processes(self) -> list[int]:
        """The processes of all nodes' servers."""
        return found(str(self.state / "turbofit" / "nodes").encode(), lambda _: True)

    def end(self) -> int:
        self.child.process.send_signal(signal.SIGTERM)
        return self.child.finish()


class Clients:
    """Threads that ask again and again, half of them for streams, and count what becomes of it.

    Each request has a word of its own, of which each token of its answer consists. ``answered`` in
    full; ``refused`` with a whole 503; ``ended`` by an error event within a stream; all others are
    ``wrong``.
    """

    def __init__(self, port: int, count: int = 8, pause: float = 0.2, tokens: int = 16) -> None:
        self._port, self._pause, self._tokens = port, pause, tokens
        self._stopped = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    @property
    def wrong(self) -> dict[str, int]:
        right = ("answered", "refused", "ended")
        return {what: n for what, n in self.outcomes.items() if what not in right}

    def more(self, count: int) -> None:
        """Wait until so many more requests are answered."""
        aim = self.outcomes["answered"] + count
        until(lambda: self.outcomes["answered"] >= aim, f"{count} answers: {self.outcomes}")

    def _run(self, number: int) -> None:
        done = 0
        while not self._stopped.wait(self._pause):
            done += 1
            word = f"{number}-{done}-{id(self)} "
            self.outcomes[self._outcome(word, stream=bool(number % 2))] += 1

    def _outcome(self, word: str, *, stream: bool) -> str:
        body = {
            "model": "internvl2-2b", "messages": [{"role": "user", "content": word}],
            "max_tokens": self._tokens, "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        try:
            status, text = ask(self._port, "/v1/chat/completions", body)
        except (OSError, http.client.HTTPException) as exc:
            return f"{type(exc).__name__}: {exc}"
        if status == 503 and json.loads(text)["error"]["code"]:
            return "refused"
        if not stream:
            documents = [json.loads(text)]
        else:
            events = text.decode().strip().removeprefix("data: ").split("\n\ndata: ")
            if events.pop() != "[DONE]":
                return f"a stream without its end: {text[-200:]!r}"
            documents = [json.loads(event) for event in events]
        if "error" in documents[-1]:
            return "ended" if documents[-1]["error"]["code"] == "engine_died" else str(documents)
        parts = [
            (each["choices"][0].get("delta") or each["choices"][0]["message"]) for each in documents
        ]
        said = "".join(part["content"] for part in parts)
        return "answered" if status == 200 and said == word * self._tokens else f"{status} {said}"


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    try:
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def found(word: bytes, fits: Callable[[int], bool]) -> list[int]:
    """The processes whose command line has this word, and that fit."""
    pids = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if word in command(pid) and fits(pid)]


@contextmanager
def served(
    state: Path, *nodes: tuple[str, str, int], words: tuple[str, ...] = ()
) -> Iterator[Serving]:
    """A cluster of these nodes (name, SPEC, GPUs), and what it serves with stand-in engines."""
    environ = {"XDG_STATE_HOME": str(state), "TURBOFIT_LEASES": f"{state}/leases", **STAND_IN}
    cloud = Cloud(**environ, STANDIN_SEEN=f"{state}/seen")
    serving = None
    try:
        for node in nodes:
            cloud.add(*node)
        serving = Serving(cloud, state, *words)
        yield serving
    finally:
        for child in serving.children if serving is not None else ():
            child.kill()
        cloud.stop()
