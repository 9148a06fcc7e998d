"""LMDeploy's PyTorch engine on two cards does not join the Ray cluster that it was placed by.

    TURBOFIT_CUDA_PATH=FOLDER python -m bench.cluster.private_ray

FOLDER holds a CUDA build of torch (scripts/check makes one). The engine shards over two cards by a
Ray of its own: in the cluster's it would wait for ever for the GPUs that it holds itself. On
pretend GPUs; some minutes. `tests/launch/cluster/test_host.py` holds the environment that decides.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from bench.cluster.cloud import Clients, Serving, cloud_of
from tests.support.processes import REPO, Child


def main() -> None:
    """Serve on two cards, ask, and look into the engine's log."""
    argparse.ArgumentParser(
        prog="python -m bench.cluster.private_ray", description=__doc__
    ).parse_args()
    children: list[Child] = []
    path = f"{os.environ['TURBOFIT_CUDA_PATH']}:{REPO}"
    with (
        tempfile.TemporaryDirectory() as folder,
        cloud_of(("two", "2xrtx3090", 2), PYTHONPATH=path, XDG_STATE_HOME=folder) as cloud,
    ):
        serving = Serving(
            children, cloud, Path(folder), "--tp", "2", "--engine", "pytorch", "--max-pixels",
            "1003520", model="qwen2-vl-2b",
        )  # fmt: skip
        try:
            serving.wait(1)
            with Clients(serving.port, 2) as clients:
                clients.more(3)
            (engine,) = serving.engines()
            log = (Path(engine["folder"]) / "engine-0.log").read_text()
            private = "Started a local Ray instance" in log
            code = serving.end()
        finally:
            for child in children:
                child.kill()
    print(f"{clients.outcomes['kept']} answered, {sum(clients.failed.values())} failed, ", end="")
    print(f"a Ray of its own: {private}, turbofit ended with {code}")
    sys.exit(not private or bool(clients.failed) or code)


if __name__ == "__main__":
    main()
