"""RESULTS.md: check x plain x gateway, and why they differ where they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bench.clients.suites import Seen
from bench.page import ran_on, table

_CLOSED = "closed, with the reason: its GPU memory is in no plan"
#: Why the gateway answers otherwise on purpose, by the name of a check, whichever suite has it.
_WHY = {
    "a body in UTF-16": "JSON between systems is UTF-8 (RFC 8259)",
    "a slash at the end of a path": "plain redirects, which clients with a body need not follow",
    "HEAD /health": "taken: load balancers ask so",
    "GET /metrics": "the gateway has metrics of its own",
    "/pooling": _CLOSED,
    "/get_ppl": _CLOSED,
    "/is_sleeping": "closed: routes that manage the engine",
    "a part of unknown type": "refused: an answer that never saw it would pass for one that did",
    "text/plain": "another 4xx for the same: it must be application/json",
    "a web page": "closed without --allow-origins, which the message names",
    "error: embeddings": "closed, with the reason; LMDeploy makes none",
    "count_tokens of an image": "plain counts the base64 as text; the gateway counts image tokens, "
    "without the two that Qwen2-VL puts around each image",
}
_HEAD = """\
# Clients with the gateway and without

Written by `python -m bench.clients --env DIR --write`: {ran_on}, no GPU. *plain* is LMDeploy's own
api_server with the settings of a plan (`turbofit serve MODEL --pretend --no-gateway`), *gateway*
the same plan behind the gateway, both on pretend GPUs: what is compared is what clients see, not
what a model says (every token is 0). Clients: {clients}.

{total} checks: {same} alike, {explained} different on purpose, {unknown} different and not
explained.
"""


@dataclass
class Run:
    """One suite at both servers; ``deaths`` are the engines that died of it."""

    plain: Mapping[str, Seen]
    gateway: Mapping[str, Seen]
    when: str
    seconds: float
    on: str
    deaths: int = 0

    def __post_init__(self) -> None:
        self.plain = {name: Seen(*seen) for name, seen in self.plain.items()}
        self.gateway = {name: Seen(*seen) for name, seen in self.gateway.items()}

    def document(self) -> dict:
        """For a file."""
        return asdict(self)

    def pairs(self) -> dict[str, tuple[Seen, Seen]]:
        """What each check saw at each server, in order."""
        none = Seen("not run")
        names = dict.fromkeys([*self.plain, *self.gateway])
        return {name: (self.plain.get(name, none), self.gateway.get(name, none)) for name in names}

    def different(self) -> list[str]:
        """Checks that saw something else."""
        return [name for name, (plain, other) in self.pairs().items() if plain.seen != other.seen]

    def summary(self) -> str:
        """One line."""
        count = len(self.pairs())
        deaths = f", {self.deaths} engines died" if self.deaths else ""
        alike = count - len(self.different())
        return f"{alike} of {count} alike in {self.seconds:.0f} s{deaths}"


def unexplained(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """Suite and check of what differs, and nobody said why."""
    return [
        (suite, name) for suite, run in runs.items() for name in run.different() if name not in _WHY
    ]


def report(runs: Mapping[str, Run], clients: list[str]) -> str:
    """The whole page."""
    total = sum(len(run.pairs()) for run in runs.values())
    different = sum(len(run.different()) for run in runs.values())
    unknown = len(unexplained(runs))
    head = _HEAD.format(
        ran_on=ran_on("lmdeploy", "transformers"), clients=", ".join(clients) or "none",
        total=total, same=total - different, explained=different - unknown, unknown=unknown,
    )  # fmt: skip
    return head + "".join(_section(name, run) for name, run in runs.items())


def _section(suite: str, run: Run) -> str:
    rows = []
    for name, (plain, other) in run.pairs().items():
        missing = f"**not explained**: {other.said or plain.said}"
        note = "" if plain.seen == other.seen else _WHY.get(name, missing)
        rows.append((name, plain.seen, other.seen, note))
    shown = f"\n{table('check | plain | gateway |', rows)}\n" if rows else ""
    return f"\n## {suite}\n\n{run.when}, {run.on}: {run.summary()}.\n{shown}"
