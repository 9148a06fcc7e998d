"""Values at the edges of every request field, against real engines behind the gateway.

    python -m bench.gateway.edges [--engines turbomind,pytorch,transformers]

Every field of LMDeploy's request models × values at its edges × routes × real engines on pretend
GPUs, behind the gateway; another client asks all the while. Counts deaths of an engine, answers 5xx
and waits of the other client over a second; prints the table of `EDGES.md` and what it found.

Needs LMDeploy, and ``TURBOFIT_CUDA_PATH`` (a folder with a CUDA build of torch and XGrammar).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from statistics import median
from typing import Any

from bench.gateway.edge_values import ABSENT, BASE, COSTLY, PATHS, edges
from bench.page import ran_on, table
from tests.support.processes import CUDA_PATH, REPO, Child
from tests.support.serving import Served, serve_pretend
from turbofit.gateway.limits.parameters import RULES
from turbofit.gateway.limits.rules import DroppedRule, Scope

MODEL = "qwen2.5-0.5b"
#: Tokens of a session: an answer without a limit goes on to its end on a pretend GPU.
CONTEXT = 256
#: A GPU computes what these give: LMDeploy finds no probability on a pretend one, and says 500.
UNJUDGED = {"logprobs", "top_logprobs", "return_logprob", "top_logprobs_num"}
#: Seconds over the median that another client waits: a slow machine is no stall.
STALL = 1.0


def ask(served: Served, path: str, body: Any) -> tuple[int, dict[str, str], Any]:
    """Status (0: no answer), headers and answer."""
    try:
        return served.ask(path, body, timeout=120, **{"anthropic-version": "2023-06-01"})
    except (OSError, HTTPException, ValueError):
        return 0, {}, None


class Other:
    """Another client: a small request after the other; remembers how long each took."""

    def __init__(self, served: Served, model: str) -> None:
        self.served, self.ended = served, threading.Event()
        self.waits: list[tuple[float, float]] = []
        self._body = {**BASE["completions"], "model": model, "max_tokens": 1}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.ended.wait(0.02):
            begun = time.monotonic()
            ask(self.served, PATHS["completions"], self._body)
            self.waits.append((begun, time.monotonic() - begun))

    def late(self, begun: float) -> tuple[float, bool]:
        """The longest wait under way since then, the one in hand too; whether that is a stall."""
        known, now = len(self.waits), time.monotonic()
        while len(self.waits) == known and time.monotonic() - now < 60:
            time.sleep(0.002)
        last = self.waits[-400:]
        slowest = max((took for start, took in last if start + took > begun), default=0)
        return slowest, slowest > STALL + median(took for _, took in last)

    def stop(self) -> None:
        """End it."""
        self.ended.set()
        self._thread.join()


@dataclass
class Row:
    """What came of one route."""

    engine: str
    kind: str
    fields: int = 0
    values: int = 0
    answered: int = 0
    lowered: int = 0
    refused: int = 0
    deaths: int = 0
    server_errors: int = 0
    unjudged: int = 0
    stalls: int = 0
    slowest: float = 0.0
    offences: list[str] = field(default_factory=list)

    def cells(self) -> tuple[object, ...]:
        """Of the table."""
        route = f"`{PATHS[self.kind]}`{', costly bodies' * (self.kind == 'costly')}"
        return (
            self.engine, route, self.fields, self.values, self.answered, self.lowered, self.refused,
            self.deaths, self.server_errors, self.unjudged, self.stalls, f"{self.slowest:.2f} s",
        )  # fmt: skip


def try_one(served: Served, other: Other, row: Row, name: str, body: dict[str, Any]) -> None:
    """One request; a wait of the other client counts where it comes again twice."""
    waits: list[float] = []
    for attempt in range(3):
        begun = time.monotonic()
        status, headers, answer = ask(served, PATHS[row.kind], body)
        wait, stalled = other.late(begun)
        waits.append(wait)
        if attempt == 0:
            row.values += 1
            row.answered += 200 <= status < 300
            row.lowered += "x-turbofit-limited" in headers
            row.refused += 400 <= status < 500
            if status == 500 and UNJUDGED & body.keys():
                row.unjudged += 1
            elif status == 0 or status >= 500:
                row.server_errors += 1
                row.offences.append(f"{row.kind} {name}: {status} {str(answer)[:120]}")
        if not stalled:
            break
    else:
        row.stalls += 1
        row.offences.append(f"{row.kind} {name}: another client waits {min(waits):.1f} s")
    row.slowest = max(row.slowest, min(waits))


def deaths(served: Served) -> int:
    """Engines that ended, as the supervisor wrote down."""
    return sum(one.get("ended") is not None for one in served.record["attempts"])


def sweep(engine: str, kinds: list[str]) -> Iterator[Row]:
    """Some routes of one engine."""
    children: list[Child] = []
    paths = os.pathsep.join(filter(None, (CUDA_PATH, str(REPO))))
    with tempfile.TemporaryDirectory() as folder:
        served = serve_pretend(
            children, Path(folder), MODEL, "--on", "1xrtx3090", "--engine", engine,
            "--context", str(CONTEXT), PYTHONPATH=paths,
        )  # fmt: skip
        try:
            served.wait()
            model = served.ask("/v1/models")[2]["data"][0]["id"]
            other = Other(served, model)
            plan = json.loads((served.run / "plan.json").read_text())
            scope = Scope(
                vocabulary=plan["model"]["text"]["vocab"],
                session=plan["kv"]["longest_request_tokens"],
            )
            for kind in kinds:
                row = Row(engine, kind, fields=len(RULES.get(kind, ())))
                before = deaths(served)
                for name, value, body in cases(model, kind, scope):
                    try_one(served, other, row, f"{name} = {value}", body)
                row.deaths = deaths(served) - before
                yield row
            other.stop()
        finally:
            for child in children:
                child.process.terminate()
                child.finish()
                child.kill()


def cases(model: str, kind: str, scope: Scope) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Field, value's name and body."""
    if kind == "costly":
        for label, body in COSTLY.items():
            yield "costly", label, {**BASE["chat"], "model": model, **body}
        return
    base = {k: model if k == "model" else v for k, v in BASE[kind].items()}
    for name, rule in RULES[kind].items():
        if isinstance(rule, DroppedRule) and name != "session_id":
            continue
        for label, value in edges(rule, scope):
            body = {k: v for k, v in base.items() if k != name}
            if value is not ABSENT:
                body[name] = value
            if name in ("input_ids", "image_data"):
                body.pop("prompt", None)
                if kind in ("chat", "messages"):
                    body["messages"] = []
            yield name, label, body


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.edges", description=__doc__)
    parser.add_argument("--engines", default="turbomind,pytorch,transformers")
    parser.add_argument("--routes", default=",".join(PATHS), help="kinds, as in `PATHS`")
    args = parser.parse_args(argv)
    rows = []
    for engine in args.engines.split(","):
        for row in sweep(engine, args.routes.split(",")):
            print(*row.cells(), *row.offences, sep="\n   ", file=sys.stderr, flush=True)
            rows.append(row)
    head = (
        "engine | route | fields | values | 2xx | of them lowered | 4xx | deaths | 5xx"
        " | not judged | stalls | slowest of another client"
    )
    print(ran_on("lmdeploy", "transformers", "turbofit"), "", sep="\n")
    print(table(head, (row.cells() for row in rows)), "", sep="\n")
    print(*(f"- {row.engine}: {offence}" for row in rows for offence in row.offences), sep="\n")
    return int(any(row.deaths or row.server_errors or row.stalls for row in rows))


if __name__ == "__main__":
    sys.exit(main())
