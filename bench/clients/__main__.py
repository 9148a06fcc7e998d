"""``python -m bench.clients --env DIR [--only WORDS] [--write]``.

Real clients against LMDeploy's own api_server on a pretend GPU, and against the same behind the
gateway, side by side. Each suite's results are kept in DIR, so that suites can be run one by one
(``--only``); ``--write`` makes RESULTS.md of all that are there. 1 where something differs and
nobody said why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.clients.environment import Environments
from bench.clients.report import Run, report, unexplained
from bench.clients.servers import Server
from bench.clients.suites import SUITES, run_suite

RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> int:
    args = _parser().parse_args()
    store = args.env / "results.json"
    runs = {name: Run(**run) for name, run in _read(store).items()}
    names = [name for name in SUITES if args.only.lower() in name.lower()]
    environments = Environments(args.env)
    if names and not args.report:
        for name, run in _runs(args, environments, names):
            runs[name] = run
            store.write_text(json.dumps({key: one.document() for key, one in runs.items()}))
            print(f"{name}: {run.summary()}", flush=True)
    text = report(runs, environments.versions())
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")
    print(text)
    return 1 if unexplained(runs) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    add = parser.add_argument
    add("--env", type=Path, required=True, metavar="DIR", help="for environments, logs and results")
    add("--only", default="", metavar="WORDS", help="suites whose name contains this")
    add("--model", default="qwen2-vl-2b", help="(default qwen2-vl-2b)")
    add("--on", default="1xrtx3090", metavar="SPEC", help="(default 1xrtx3090)")
    add("--report", action="store_true", help="run nothing: tell what is there")
    add("--write", action="store_true", help="write RESULTS.md")
    return parser


def _read(store: Path) -> dict:
    return json.loads(store.read_text()) if store.exists() else {}


def _runs(args: argparse.Namespace, environments: Environments, names: list[str]):
    """Each suite against both servers, which start and work side by side."""
    args.env.mkdir(parents=True, exist_ok=True)
    words = [args.model, "--on", args.on]
    servers: list[Server] = []
    try:
        for gateway in (False, True):
            # With a parser of tool calls, so that requests with tools are taken at all.
            passed = ["--tool-call-parser", "qwen"]
            servers.append(Server(args.env, words, gateway=gateway, passed=passed))
        urls = [server.url() for server in servers]
        for name in names:
            began = time.monotonic()
            with ThreadPoolExecutor(2) as pool:
                plain, gateway = pool.map(
                    lambda url: run_suite(environments, name, url), urls,  # noqa: B023
                )  # fmt: skip
            yield name, Run(
                plain=plain, gateway=gateway, when=time.strftime("%Y-%m-%d"),
                seconds=time.monotonic() - began, on=f"{args.model}, {args.on}",
                deaths=sum(server.deaths() for server in servers),
            )  # fmt: skip
    finally:
        for server in servers:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
