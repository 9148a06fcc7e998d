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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.support.processes import HANG, REPO, STANDIN, Child, free_port

#: Seconds between a client's requests, and while something starts, which needs the processor.
_PAUSE, _MEANWHILE = 0.2, 1.0
#: Seconds between two looks at what is waited for.
_LOOK = 0.5
#: What clients of the fronts show.
KEY = "secret"
#: The driver and Ray's own processes find each other by these; no token, no dashboard.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled", "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_worker_niceness": "0",
}  # fmt: skip
#: What we start in Ray takes none; with some, Ray starts idle workers for each command.
_NO_CPUS = {"num_cpus": 0}
#: In the place of engines of nodes: a server without LMDeploy, as fast as these are.
STAND_IN = {"PYTHONPATH": f"{STANDIN}:{REPO}", "STANDIN_PACE": "0.02", "STANDIN_FREE": "100000"}
#: Ray's own deadlines for what a machine under load starts: only what hangs reaches these.
PATIENT = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
}


class Cloud:
    """Nodes of one Ray cluster, each with pretend GPUs.

    Args:
        head: the name, the machine and the GPUs of its first node, as `add` takes them.
        environ: of everything on its nodes.
    """

    def __init__(self, head: tuple[str, str, int], **environ: str) -> None:
        from ray.cluster_utils import Cluster  # it takes a second, of each worker that collects

        self.environ = environ
        #: What the command line of its engines has.
        self.engine = "fake_server.py" if "STANDIN_PACE" in environ else "turbomind.server"
        os.environ.update(ENVIRONMENT | PATIENT)
        #: In the environment of all that runs on its nodes.
        self.mark = f"turbofit-test-{uuid4().hex}"
        #: Ray puts its own in its place and leaves it there.
        self._sigterm = signal.getsignal(signal.SIGTERM)
        name, spec, gpus = head
        # `turbofit` takes no logs from Ray and asks it for no more nodes.
        without = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        args = {**self._node(name, spec, gpus), **without}
        self._cluster = Cluster(initialize_head=True, head_node_args=args)
        self._cluster.wait_for_nodes(HANG)
        self.nodes: dict[str, Any] = {name: self.head}

    @property
    def head(self) -> Any:
        return self._cluster.head_node

    @property
    def address(self) -> str:
        """For ``--cluster``."""
        return f"ray:{self._cluster.address}"

    def add(self, name: str, spec: str, gpus: int) -> None:
        self.nodes[name] = self._cluster.add_node(**self._node(name, spec, gpus))
        self._cluster.wait_for_nodes(HANG)

    def _node(self, name: str, spec: str, gpus: int) -> dict[str, Any]:
        """What Ray is told of a node."""
        environ = {
            "TURBOFIT_NODE_SPEC": spec, "CLOUD": f"{self.mark}/{name}", **ENVIRONMENT, **PATIENT,
            **self.environ,
        }  # fmt: skip
        return {**_NO_CPUS, "num_gpus": gpus, "wait": False, "env_vars": environ}

    def identity(self, name: str) -> str:
        return str(self.nodes[name].node_id)

    def engine_pids(self, name: str = "") -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line, environ = path.read_bytes(), path.with_name("environ").read_bytes()
            except OSError:
                continue
            is_engine = self.engine.encode() in line
            if is_engine and b"guard.py" not in line and f"{self.mark}/{name}".encode() in environ:
                found.append(int(path.parent.name))
        return sorted(found)

    def kill(self, name: str) -> None:
        """The node's raylet dies: what it started has to go by itself."""
        node = self.nodes.pop(name)
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        # Whoever started it reaps it, or its processes never see that it has gone.
        raylet.wait()
        self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()
        signal.signal(signal.SIGTERM, self._sigterm)


class Serving:
    """``turbofit serve --cluster --pretend`` in a process, whose key is `KEY`."""

    def __init__(
        self, children: list[Child], cloud: Cloud, state: Path, *words: str, model: str
    ) -> None:
        self.cloud, self.state, self.port = cloud, state, free_port()
        self._children, self._environ = children, {"XDG_STATE_HOME": str(state), **cloud.environ}
        self._words = [
            "serve", model, "--cluster", cloud.address, "--pretend", "--port", str(self.port),
            "--drain", "120", *words,
        ]  # fmt: skip
        self.again()

    def again(self) -> None:
        self.child = self._run(*self._words)

    def front(self) -> int:
        """Another front; its port, once it has nodes."""
        port = free_port()
        words = ("--access-log", "none", "--api-key", KEY)
        self._run("gateway", "--cluster", self.cloud.address, "--port", str(port), *words)
        until(lambda: up_at(port))
        return port

    def _run(self, *words: str) -> Child:
        argv = [sys.executable, "-m", "turbofit", *words]
        child = Child(argv, standin=False, **self._environ)
        self._children.append(child)
        return child

    def cli(self, *words: str) -> tuple[int, Any]:
        return cli(self.state, "cluster", *words, "--cluster", self.cloud.address)

    def status(self) -> dict[str, Any]:
        code, told = self.cli("status")
        return told[0] if code == 0 and told else {"nodes": []}

    def node(self, name: str) -> dict[str, Any]:
        """What it tells of one node; empty while it is not there."""
        identity = self.cloud.identity(name)
        return next((one for one in self.status()["nodes"] if one["id"] == identity), {})

    def up(self, name: str = "") -> int:
        """How many nodes the front has; of one node, whether it has that."""
        if not name:
            return up_at(self.port)
        up = rf'engine_up{{engine="[^"]*-{self.cloud.identity(name)[:6]}"}} (\d)'
        found = re.search(up, _ask(self.port, "/metrics")[1])
        return int(found[1]) if found else 0

    def wait(self, nodes: int) -> None:
        def settled() -> bool:
            assert self.child.process.poll() is None, self.child.stderr
            return self.up() == nodes

        until(settled, HANG, lambda: self.child.stderr[-3000:])

    def server(self, name: str) -> int:
        lease = f"{self._folder(name)}/lease".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                line = path.read_bytes()
                if lease in line and not line.startswith(b"/bin/sh"):
                    return int(path.parent.name)
        return 0

    def key(self, name: str) -> str:
        return (self._folder(name) / "key").read_text().strip()

    def actor(self, name: str) -> int:
        return self._worker(b"ray::NodeActor", self.cloud.nodes[name])

    def board(self) -> int:
        return self._worker(b"ray::Board", self.cloud.head, *self.cloud.nodes.values())

    def _worker(self, title: bytes, *nodes: Any) -> int:
        for node in nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            for task in Path(f"/proc/{raylet}/task").glob("*/children"):
                for pid in task.read_text().split():
                    if title in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
        raise AssertionError(f"no {title!r}")

    def ray_logs(self) -> list[Path]:
        logs = Path(self.cloud.head.get_logs_dir_path())
        return [path for path in logs.rglob("*") if path.is_file()]

    def _folder(self, name: str) -> Path:
        found = (self.state / "turbofit" / "nodes").glob(f"*-{self.cloud.identity(name)[:12]}")
        return next(found)

    def end(self) -> int:
        self.child.process.send_signal(signal.SIGTERM)
        return self.child.finish()


class Clients:
    """Threads that ask again and again, half of them for streams, and count what becomes of it.

    ``kept``: answered in full. ``broken``: an answer that had begun and ended with an error.
    ``lost``: not begun, since its engine died and may have died of it. ``failed``: never begun
    otherwise, by status.
    """

    def __init__(self, port: int, count: int = 8, tokens: int = 16) -> None:
        self._port, self._tokens, self._pause = port, tokens, _PAUSE
        self._stopped = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(n % 2,)) for n in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    @property
    def lost(self) -> int:
        return self.outcomes.total() - self.outcomes["kept"]

    @property
    def failed(self) -> dict[str, int]:
        """Requests that were never begun to be answered."""
        return {what: n for what, n in self.outcomes.items() if what.startswith("failed")}

    def more(self, count: int, seconds: float = HANG) -> None:
        aim = self.outcomes["kept"] + count
        until(lambda: self.outcomes["kept"] >= aim, seconds, lambda: str(self.outcomes))

    def meanwhile(self, found: Callable[[], Any]) -> None:
        """Until it finds something, with fewer requests."""
        self._pause = _MEANWHILE
        until(found, why=lambda: str(self.outcomes))
        self._pause = _PAUSE

    def _run(self, stream: int) -> None:
        name = _ask(self._port, "/v1/models")[1]["data"][0]["id"]
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "stream": bool(stream),
        }
        while not self._stopped.wait(self._pause):
            self.outcomes[_outcome(self._port, body)] += 1


def up_at(port: int) -> int:
    try:
        return int(_ask(port, "/health")[1]["up"])
    except OSError:
        return 0


def cli(state: Path, *words: str) -> tuple[int, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", *words, "--json"],
        env={**os.environ, "XDG_STATE_HOME": str(state)}, capture_output=True, text=True,
        timeout=HANG, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def _outcome(port: int, body: dict[str, Any]) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    begun = False
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )  # fmt: skip
        answer = connection.getresponse()
        if answer.status != 200:
            said = answer.read()
            return "lost" if b"engine_died" in said else f"failed {answer.status} {said[:200]!r}"
        begun = True
        text = answer.read()
    except (OSError, http.client.HTTPException) as exc:
        return "broken" if begun else f"failed {type(exc).__name__}"
    else:
        whole = text.rstrip().endswith(b"[DONE]") if body["stream"] else b'"usage"' in text
        return "kept" if whole else "broken"
    finally:
        connection.close()


def _ask(port: int, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text
    finally:
        connection.close()


def until(
    found: Callable[[], Any], seconds: float = HANG, why: Callable[[], str] = lambda: ""
) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(_LOOK)
    raise AssertionError(f"not within {seconds:.0f} s\n{why()}")


@contextmanager
def cloud_of(
    head: tuple[str, str, int], *nodes: tuple[str, str, int], **environ: str
) -> Iterator[Cloud]:
    cloud = Cloud(head, **environ)
    try:
        for node in nodes:
            cloud.add(*node)
        yield cloud
    finally:
        cloud.stop()
