"""Three pretend nodes of a Ray cluster under kills: what becomes of clients' requests?

    python -m bench.cluster --minutes 10 --write

Engines are stand-ins without LMDeploy. In turn an engine, a `turbofit serve`, an actor, the
controller and a raylet are killed, a node joins, and one is drained. Clients ask another front than
the controller's, which ends with it; another controller starts at once and takes over. Exits with 1
where an answer was wrong, an engine had a request twice, a drain or the controller's end lost one,
or something is left at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path

from bench.page import ran_on, table
from tests.support.cloud import Clients, Cloud, Serving, ask, found, served
from tests.support.waiting import until
from turbofit.core.process.processes import stat_of

RESULTS = Path(__file__).with_name("RESULTS.md")
NODES = (("a", "2xrtx3090", 2), ("b", "1xl4", 1), ("c", "1xa100", 1))
EVENTS = ("engine", "server", "actor", "controller", "raylet and join", "drain and join")


def parent(pid: int) -> int:
    """Return the parent of a process; 0 if there is no such process."""
    return int((stat_of(pid) or ["", "0"])[1])


def ancestors(pid: int) -> list[int]:
    found_ = []
    while (pid := parent(pid)) > 1:
        found_.append(pid)
    return found_


def actor_of(cloud: Cloud, name: str) -> int:
    """Return the process of a node's actor; 0 while there is none."""
    raylet = cloud.nodes[name].all_processes["raylet"][0].process.pid
    return sum(found(b"ray::NodeActor", lambda pid: parent(pid) == raylet)[:1])


def engines_of(serving: Serving, name: str) -> list[int]:
    """Return the processes of a node's engines."""
    return found(b"fake_server.py", lambda pid: serving.server(name) in ancestors(pid))


def own_front_serves(serving: Serving) -> bool:
    """Return whether the front in the controller's process has a node that serves."""
    try:
        return ask(serving.own, "/health")[0] == 200
    except OSError:
        return False


def happen(what: str, serving: Serving, name: str) -> None:
    """Make an event happen on a node; returns when the front has all nodes again."""
    cloud, before = serving.cloud, until(lambda: serving.server(name), f"the server of {name}")
    node = next(node for node in NODES if node[0] == name)
    if what == "engine":
        engines = until(lambda: engines_of(serving, name), f"the engines of {name}")
        os.kill(engines[0], signal.SIGKILL)
        until(
            lambda: len(now := engines_of(serving, name)) == len(engines) and engines[0] not in now,
            f"another engine of {name}",
        )
    elif what == "server":
        os.kill(before, signal.SIGKILL)
        until(lambda: serving.server(name) not in (0, before), f"another server of {name}")
    elif what == "actor":
        actor = actor_of(cloud, name)
        os.kill(actor, signal.SIGKILL)
        until(lambda: actor_of(cloud, name) not in (0, actor), f"another actor of {name}")
    elif what == "controller":
        servers = serving.servers()
        serving.kill()
        serving.again().wait_for("taken over")
        until(lambda: own_front_serves(serving), "the controller's own front")
        assert serving.servers() == servers
    else:
        if what.startswith("drain"):
            assert serving.cli("cluster", "drain", cloud.identity(name))[0] == 0
            until(lambda: serving.state_of(name) == "drained", f"{name} to be drained")
        cloud.kill(name)
        until(lambda: name not in serving.up(), f"{name} to be out")
        cloud.add(*node)
    serving.wait(*(each for each, _, _ in NODES))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cluster", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), *NODES) as serving:
        names = [name for name, _, _ in NODES]
        serving.wait(*names)
        ends = time.monotonic() + 60 * args.minutes
        with Clients(serving.port, args.clients) as clients:
            for number in count():
                what, name = EVENTS[number % 6], names[(number + number // 6) % 3]
                began, before = time.monotonic(), clients.outcomes.copy()
                if began > ends:
                    break
                happen(what, serving, name)
                seconds[what].append(time.monotonic() - began)
                clients.more(4 * args.clients)
                outcomes[what] += clients.outcomes - before
        code, left = serving.end(), found(folder.encode(), lambda _: True)
        words = Counter(word for word in Path(folder, "seen").read_text().split() if "-" in word)
    twice = sum(times > 1 for times in words.values())
    all_ = clients.outcomes
    rows = [
        (what, len(seconds[what]), *(outcomes[what][it] for it in ("answered", "refused", "ended")),
         f"{max(seconds[what]):.0f} s")
        for what in EVENTS if what in seconds
    ]  # fmt: skip
    head = (
        "event | times | answered | clean 503 | streams ended by an error | all nodes back, at most"
    )
    text = (
        f"{ran_on('ray')}, {args.minutes:g} minutes, {args.clients} clients, nodes"
        f" {', '.join(spec for _, spec, _ in NODES)}. {all_.total():,} requests:"
        f" {all_['answered']:,} answered, {all_['refused']} clean 503, {all_['ended']} streams"
        f" ended by an error, {sum(clients.wrong.values())} wrong {clients.wrong or ''}; {twice}"
        f" twice at an engine; `serve` ended with {code} and left {len(left)} processes. Clients"
        " asked another front than the controller's own, which answers again when all nodes are"
        " back.\n\n"
        f"{table(head, rows, right='12345')}\n"
    )
    print(text)
    if args.write:
        title = "# What kills of a cluster's parts cost its clients"
        RESULTS.write_text(f"{title}\n\n{text}", encoding="utf-8")
    safe = [outcomes[what] for what in ("controller", "drain and join")]
    lost = sum(each.total() - each["answered"] for each in safe)
    return int(bool(clients.wrong or twice or lost or code or left))


if __name__ == "__main__":
    sys.exit(main())
