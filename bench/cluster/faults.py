"""What clients notice of a cluster's misfortunes: a real Ray cluster on this host, pretend GPUs.

    python -m bench.cluster.faults

Every event under the load of eight clients, half of them streaming. Engines are LMDeploy's own on
pretend GPUs: whether a request is answered, retried or broken off is real, how fast it is answered
is not. Nodes share one host, so that a dying node's connections end at once; a machine that loses
its power is `tests/gateway/test_vanish.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.cluster.cloud import Clients, Cloud, Serving, cloud_of, until
from tests.support.processes import Child

NODES = (("a", "2xrtx3090", 2), ("b", "2xrtx3090", 2), ("c", "1xrtx4090", 1))
ENGINES = 5


def main() -> None:
    """Run all events and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster.faults", description=__doc__)
    parser.add_argument("--model", default="internvl2-2b")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| event | less than all serve after, s | all serve again after, s | answered | retried |"
          " broken off | failed |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for number in range(args.rounds):
        children: list[Child] = []
        with cloud_of(*NODES) as cloud, tempfile.TemporaryDirectory() as folder:
            serving = Serving(
                children, cloud, Path(folder), "--tp", "1", "--access-log", "none", model=args.model
            )
            try:
                serving.wait(ENGINES, 240)
                round_of(cloud, serving, number)
            finally:
                serving.child.process.kill()


def round_of(cloud: Cloud, serving: Serving, number: int) -> None:
    """Each event once."""
    with Clients(serving.port, 8) as clients:
        clients.more(20)

        def event(name: str, cause: Callable[[], object], engines: int, fewer: int | None) -> None:
            before, retried, began = Counter(clients.outcomes), _retried(serving), time.monotonic()
            cause()
            gone = "" if fewer is None else f"{_until_up(serving, fewer, began):.1f}"
            until(lambda: _up(serving) == engines, 180)
            took = time.monotonic() - began
            clients.more(20)
            seen = clients.outcomes - before
            failed = sum(n for what, n in seen.items() if what.startswith(("failed", "lost")))
            cells = (f"{name} ({number + 1})", gone, f"{took:.1f}", seen["kept"],
                     _retried(serving) - retried, seen["broken"], failed)  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)

        event("an engine is killed", lambda: os.kill(cloud.engine_pids()[0], signal.SIGKILL),
              ENGINES, ENGINES - 1)  # fmt: skip
        event("a node is killed", lambda: cloud.kill("b"), ENGINES - 2, ENGINES - 2)
        event("a node joins", lambda: cloud.add("d", "2xrtx3090", 2), ENGINES, None)
        event("the plan changes", lambda: _change(serving), ENGINES, None)
        left = ENGINES - 1
        event("a node is drained", lambda: serving.cli("drain", cloud.identity("c")), left, left)


def _change(serving: Serving) -> None:
    code, told = serving.cli("change", "--context", "16384")
    assert code == 0, told
    until(lambda: "the plan has changed" in serving.child.stderr, 240)


def _until_up(serving: Serving, engines: int, began: float) -> float:
    """Seconds until no more than so many are up, as the gateway itself tells."""
    until(lambda: _up(serving) <= engines, 60)
    return time.monotonic() - began


def _up(serving: Serving) -> int:
    return sum(line.endswith(" 1") for line in _page(serving) if "gateway_engine_up{" in line)


def _retried(serving: Serving) -> int:
    found = [line for line in _page(serving) if line.startswith("turbofit_gateway_retried_total")]
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


def _page(serving: Serving) -> list[str]:
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{serving.port}/metrics", timeout=10) as page:
        return page.read().decode().splitlines()


if __name__ == "__main__":
    main()
