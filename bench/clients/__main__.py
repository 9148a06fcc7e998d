"""``python -m bench.clients --env DIR [--only WORDS] [--write]``.

Real clients against LMDeploy's own api_server on a pretend GPU, and against the same behind the
gateway, side by side. Each suite's results are kept in DIR, so that suites can be run one by one
(``--only``, of which ``nothing`` runs none); ``--write`` makes RESULTS.md of all that are there. 1
where something differs and nobody said why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.clients.report import Run, report, unexplained
from bench.clients.suites import SUITES, Environments, run
from tests.support.processes import HANG, Child, free_port
from tests.support.serving import start_turbofit

MODEL, ON = "qwen2-vl-2b", "1xrtx3090"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    add = parser.add_argument
    add("--env", type=Path, required=True, metavar="DIR", help="for environments and results")
    add("--only", default="", metavar="WORDS", help="suites whose name contains this")
    add("--write", action="store_true", help="write RESULTS.md")
    args = parser.parse_args()
    store = args.env / "results.json"
    kept = json.loads(store.read_text()) if store.exists() else {}
    runs = {name: Run(**run) for name, run in kept.items()}
    environments = Environments(args.env)
    if names := [name for name in SUITES if args.only.lower() in name.lower()]:
        for name, done in _runs(args.env, environments, names):
            runs[name] = done
            store.write_text(json.dumps({key: one.document() for key, one in runs.items()}))
            print(f"{name}: {done.summary()}", flush=True)
    text = report(runs, environments.versions())
    if args.write:
        Path(__file__).with_name("RESULTS.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if unexplained(runs) else 0


def _runs(folder: Path, environments: Environments, names: list[str]) -> Iterator[tuple[str, Run]]:
    """Each suite against both servers, which start and work side by side."""
    children: list[Child] = []
    try:
        for kind, words in (("plain", ["--no-gateway"]), ("gateway", [])):
            # With a parser of tool calls, so that requests with tools are taken at all.
            words += ["--pretend", "--port", str(free_port()), "--", "--tool-call-parser", "qwen"]
            state = folder.resolve() / kind
            start_turbofit(children, state, "serve", MODEL, "--on", ON, *words)
        urls = [_url(child) for child in children]
        for name in names:
            command, began = environments.command(name), time.monotonic()
            with ThreadPoolExecutor(2) as pool:
                plain, gateway = pool.map(partial(run, command), urls)
            said = "\n".join(child.stderr for child in children)
            yield name, Run(
                plain=plain, gateway=gateway, when=time.strftime("%Y-%m-%d"),
                seconds=time.monotonic() - began, on=f"{MODEL}, {ON}",
                deaths=said.count("the engine ended while it served"),
            )  # fmt: skip
        for child in children:
            child.process.terminate()
            child.finish(HANG)
    finally:
        for child in children:
            child.kill()


def _url(child: Child) -> str:
    """Its address, once it serves."""
    assert child.process.stdout is not None
    child.wait_for("phase: ready")
    return child.process.stdout.readline().strip()


if __name__ == "__main__":
    sys.exit(main())
