"""Nodes with a network between them: the cable of one is pulled under load.

    python -m bench.cluster.apart            # as root, on Linux with `ip netns`

Ray's head and the gateway are on this host's own network, each other node in a network namespace
with an address of its own; engines are LMDeploy's own on pretend GPUs. Nothing says farewell when a
cable is pulled: no connection is reset, and Ray notices by its heartbeats alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cluster.cloud import ENVIRONMENT, Clients, Serving, until
from bench.cluster.faults import _retried, _up
from tests.support.processes import Child

HEAD = "10.213.99.1"
PORT = 26379


def main() -> None:
    """Serve on two namespaces, pull the cable of one, and tell what clients noticed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster.apart", description=__doc__)
    parser.add_argument("--model", default="internvl2-2b")
    parser.add_argument("--seconds", type=float, default=60.0, help="without the cable")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    children: list[Child] = []
    with (
        bridge(),
        ray("head", "--head", "--port", str(PORT), "--num-gpus", "0", inside=None),
        node("a", 2, "2xrtx3090"),
        node("b", 3, "1xrtx4090"),
        tempfile.TemporaryDirectory() as folder,
    ):
        words = ("--tp", "1", "--access-log", "none")
        serving = Serving(children, Apart(), Path(folder), *words, model=args.model)
        try:
            serving.wait(3, 240)
            pulled(serving, args.seconds)
        finally:
            serving.child.process.send_signal(signal.SIGTERM)
            serving.child.process.wait(120)
            print("\n".join(serving.child.lines[-6:]), file=sys.stderr)


def pulled(serving: Serving, seconds: float) -> None:
    """Pull the cable of node a, and put it back."""
    for engine in serving.engines():
        print(f"{engine['name']}: {engine['url']}")
    with Clients(serving.port, 8) as clients:
        clients.more(20)
        before, retried, began = clients.outcomes.copy(), _retried(serving), time.monotonic()
        run("ip", "link", "set", "tfc-a", "down")
        until(lambda: _up(serving) == 1, 60)
        print(f"engines taken out after {time.monotonic() - began:.1f} s")
        until(lambda: "is gone" in serving.child.stderr, 120)
        print(f"Ray told of the node after {time.monotonic() - began:.1f} s")
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))
        seen = clients.outcomes - before
        print(f"answered {seen['kept']}, retried {_retried(serving) - retried}, "
              f"broken off {seen['broken']}, failed {sum(clients.failed.values())}")  # fmt: skip
        print(clients.failed or "nothing failed")


class Apart:
    """What `Serving` needs of a cluster."""

    address = f"ray:{HEAD}:{PORT}"

    def __init__(self) -> None:
        self.environ: dict[str, str] = {}


@contextmanager
def bridge() -> Iterator[None]:
    """The network between the nodes."""
    run("ip", "link", "add", "tfc", "type", "bridge")
    try:
        run("ip", "addr", "add", f"{HEAD}/24", "dev", "tfc")
        run("ip", "link", "set", "tfc", "up")
        yield
    finally:
        run("ip", "link", "del", "tfc")


@contextmanager
def node(name: str, number: int, spec: str) -> Iterator[None]:
    """A namespace with an address, and Ray in it."""
    space, address = f"tfc-ns-{name}", f"10.213.99.{number}"
    run("ip", "netns", "add", space)
    try:
        run("ip", "link", "add", f"tfc-{name}", "type", "veth", "peer", "name", "eth0", "netns",
            space)  # fmt: skip
        run("ip", "link", "set", f"tfc-{name}", "master", "tfc", "up")
        inside = ("ip", "netns", "exec", space)
        for words in (("addr", "add", f"{address}/24", "dev", "eth0"),
                      ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):  # fmt: skip
            run(*inside, "ip", *words)
        with ray(
            name, "--address", f"{HEAD}:{PORT}", "--num-gpus", spec.partition("x")[0],
            inside=space, address=address, TURBOFIT_NODE_SPEC=spec,
        ):  # fmt: skip
            yield
    finally:
        subprocess.run(["ip", "link", "del", f"tfc-{name}"], check=False, capture_output=True)
        run("ip", "netns", "del", space)


@contextmanager
def ray(
    name: str, *words: str, inside: str | None, address: str = HEAD, **environ: str
) -> Iterator[None]:
    """One of Ray's nodes, in the foreground of a process of ours."""
    space = ("ip", "netns", "exec", inside) if inside else ()
    ray_ = str(Path(sys.executable).with_name("ray"))
    process = subprocess.Popen(
        [*space, ray_, "start", "--block", "--num-cpus", "2", "--node-ip-address", address,
         "--disable-usage-stats", *words],
        env={**os.environ, **environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        time.sleep(6)
        if process.poll() is not None:
            raise SystemExit(f"ray of {name} did not start")
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def run(*words: str) -> None:
    """A command that must work."""
    subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
