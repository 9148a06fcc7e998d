"""Values at the edges of every request field, against real engines behind the gateway.

    python -m bench.gateway.edges [--engines turbomind,pytorch,transformers] [--write]

Every field of LMDeploy's request models × values at its edges × routes × real engines on pretend
GPUs, behind the gateway; another client asks all the while. Counts deaths of an engine, answers 5xx
and waits of the other client over a second. ``--write`` renews `EDGES.md`.

Needs LMDeploy, and ``TURBOFIT_CUDA_PATH`` (a folder with a CUDA build of torch and XGrammar).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from bench.gateway.edge_values import ABSENT, BASE, COSTLY, PATHS, edges
from turbofit.gateway.limits.parameters import RULES
from turbofit.gateway.limits.rules import DroppedRule, Scope

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = "qwen2.5-0.5b"
#: Tokens of a session: an answer without a limit goes on to its end on a pretend GPU.
CONTEXT = 256
#: A GPU computes what these give: LMDeploy finds no probability on a pretend one, and says 500.
UNJUDGED = {"logprobs", "top_logprobs", "return_logprob", "top_logprobs_num"}
STALL = 1.0


class Server:
    """``turbofit serve --pretend`` in a process group of its own."""

    def __init__(self, engine: str, state: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        paths = [os.environ.get("TURBOFIT_CUDA_PATH", ""), str(ROOT)]
        self.state, self.log = state, (state / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "turbofit", "serve", MODEL, "--on", "1xrtx3090", "--pretend",
             "--engine", engine, "--context", str(CONTEXT), "--port", str(self.port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                 "XDG_STATE_HOME": str(state), "TURBOFIT_LEASES": str(state / "leases")},
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 600
        while self.ask("GET", "/health")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit((state / "log").read_text()[-2000:])
            time.sleep(0.2)
        self.model: str = json.loads(self.ask("GET", "/v1/models")[1])["data"][0]["id"]

    def ask(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status (0: no answer), body and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        except (OSError, http.client.HTTPException):
            return 0, b"", {}
        finally:
            connection.close()

    @property
    def deaths(self) -> int:
        """Engines that ended, as the supervisor wrote down."""
        runs = (self.state / "turbofit" / "runs").glob("*/run.json")
        records = [json.loads(run.read_text()) for run in runs]
        return sum(
            1 for record in records for one in record["attempts"] if one.get("ended") is not None
        )

    def stop(self) -> None:
        """End it, and all that it started."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


class Other:
    """Another client: a small request after the other; remembers how long each took."""

    def __init__(self, server: Server) -> None:
        self.server, self.ended = server, threading.Event()
        self.waits: list[tuple[float, float]] = []
        self.failures = 0
        body = {**BASE["completions"], "model": server.model, "max_tokens": 1}
        self._body = json.dumps(body).encode()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.ended.wait(0.02):
            begun = time.monotonic()
            status = self.server.ask("POST", PATHS["completions"], self._body)[0]
            self.failures += status != 200
            self.waits.append((begun, time.monotonic() - begun))

    def slowest(self, begun: float) -> float:
        """The longest wait that was under way since then; the one in hand is waited for."""
        known, now = len(self.waits), time.monotonic()
        while len(self.waits) == known and time.monotonic() - now < 60:
            time.sleep(0.002)
        return max(
            (took for start, took in list(self.waits)[-400:] if start + took > begun), default=0
        )

    @property
    def usual(self) -> float:
        """The median wait: a slow machine is no stall."""
        return median(took for _, took in self.waits[-400:])

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


def try_one(server: Server, other: Other, row: Row, name: str, body: dict[str, Any]) -> None:
    """One request; a wait of the other client counts where it comes again twice."""
    data, path = json.dumps(body).encode(), PATHS[row.kind]
    waits: list[float] = []
    for attempt in range(3):
        begun = time.monotonic()
        status, raw, headers = server.ask("POST", path, data)
        waits.append(other.slowest(begun))
        if attempt == 0:
            row.values += 1
            row.answered += 200 <= status < 300
            row.lowered += "x-turbofit-limited" in headers
            row.refused += 400 <= status < 500
            if status == 0 or status >= 500:
                judged = not (UNJUDGED & body.keys() and status == 500)
                row.server_errors += judged
                row.unjudged += not judged
                if judged:
                    row.offences.append(f"{row.kind} {name}: {status} {raw[:120]!r}")
        if waits[-1] <= STALL + other.usual:
            break
    row.slowest = max(row.slowest, min(waits))
    if min(waits) > STALL + other.usual:
        row.stalls += 1
        row.offences.append(f"{row.kind} {name}: another client waits {min(waits):.1f} s")


def sweep(engine: str, kinds: list[str]) -> list[Row]:
    """Some routes of one engine."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(engine, Path(folder))
        other = Other(server)
        try:
            plan = json.loads(next(Path(folder).glob("turbofit/runs/*/plan.json")).read_text())
            scope = Scope(
                vocabulary=plan["model"]["text"]["vocab"] if "text" in plan["model"] else 151936,
                session=plan["kv"]["longest_request_tokens"],
            )
            for kind in kinds:
                row = Row(engine, kind)
                rows.append(row)
                deaths = server.deaths
                for name, value, body in cases(server.model, kind, scope):
                    try_one(server, other, row, f"{name} = {value}", body)
                row.fields = len(RULES.get(kind, ()))
                row.deaths = server.deaths - deaths
                print(summary(row), file=sys.stderr, flush=True)
                for offence in row.offences:
                    print("   ", offence, file=sys.stderr, flush=True)
        finally:
            other.stop()
            server.stop()
    return rows


def cases(model: str, kind: str, scope: Scope) -> list[tuple[str, str, dict[str, Any]]]:
    """Field, value's name and body."""
    if kind == "costly":
        chat = {**BASE["chat"], "model": model}
        return [("costly", label, {**chat, **body}) for label, body in COSTLY.items()]
    base = {k: model if k == "model" else v for k, v in BASE[kind].items()}
    made: list[tuple[str, str, dict[str, Any]]] = []
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
            made.append((name, label, body))
    return made


def summary(row: Row) -> str:
    """One line of the table."""
    costly = ", costly bodies" * (row.kind == "costly")
    return (
        f"| {row.engine} | `{PATHS[row.kind]}`{costly} | {row.fields} | {row.values} "
        f"| {row.answered} | {row.lowered} | {row.refused} | {row.deaths} | {row.server_errors} "
        f"| {row.unjudged} | {row.stalls} | {row.slowest:.2f} s |"
    )


def report(rows: list[Row]) -> str:
    """The page."""

    def found(package: str) -> str:
        with suppress(PackageNotFoundError):
            return version(package)
        return "-"

    versions = ", ".join(f"{one} {found(one)}" for one in ("lmdeploy", "transformers", "turbofit"))
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    offences = [f"- {row.engine}: {one}" for row in rows for one in row.offences]
    head = (
        "| engine | route | fields | values | 2xx | of them lowered | 4xx | deaths | 5xx "
        "| not judged | stalls | slowest of another client |"
    )
    return "\n".join(
        [
            "# Every parameter at its edges",
            "",
            f"`python -m bench.gateway.edges --write`, {date}: {platform.machine()}, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}; Python "
            f"{platform.python_version()}, {versions}; {MODEL} on a pretend RTX 3090.",
            "",
            head,
            "|" + "---|" * 12,
            *(summary(row) for row in rows),
            "",
            f"Sessions of {CONTEXT} tokens. A stall is a wait of another client of 1 s over its "
            "median in three of three tries. Not judged: probabilities, which a pretend GPU does "
            "not compute: LMDeploy finds none and answers 500.",
            "",
            *(["Found:", "", *offences] if offences else ["Nothing else was found."]),
            "",
        ]
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.edges", description=__doc__)
    parser.add_argument("--engines", default="turbomind,pytorch,transformers")
    parser.add_argument("--routes", default=",".join(PATHS), help="kinds, as in `PATHS`")
    parser.add_argument("--write", action="store_true", help="renew EDGES.md")
    args = parser.parse_args(argv)
    rows = [
        row for engine in args.engines.split(",") for row in sweep(engine, args.routes.split(","))
    ]
    page = report(rows)
    if args.write:
        (HERE / "EDGES.md").write_text(page)
    print(page, end="")
    return int(any(row.deaths or row.server_errors or row.stalls for row in rows))


if __name__ == "__main__":
    sys.exit(main())
