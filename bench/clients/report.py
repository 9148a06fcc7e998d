"""RESULTS.md: check x plain x gateway, and why they differ where they do."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version

from bench.clients.suites import Seen
from bench.clients.why import why

__all__ = ["Run", "report", "unexplained"]

_HEAD = """\
# Clients with the gateway and without

Written by `python -m bench.clients --env DIR --write`: {versions}, Python
{python}, {cpus} CPUs, no GPU. *plain* is LMDeploy's own api_server with the settings of a plan
(`turbofit serve MODEL --pretend --no-gateway`), *gateway* the same plan behind the gateway, both on
pretend GPUs: what is compared is what clients see, not what a model says (every token is 0).
Clients: {clients}.

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

    def names(self) -> list[str]:
        """All checks, in order."""
        return list(dict.fromkeys([*self.plain, *self.gateway]))

    def pair(self, name: str) -> tuple[Seen, Seen]:
        """What one check saw at each."""
        none = Seen("not run")
        return self.plain.get(name, none), self.gateway.get(name, none)

    def different(self) -> list[str]:
        """Checks that saw something else."""
        return [name for name in self.names() if len({one.seen for one in self.pair(name)}) > 1]

    def summary(self) -> str:
        """One line."""
        alike = len(self.names()) - len(self.different())
        deaths = f", {self.deaths} engines died" if self.deaths else ""
        return f"{alike} of {len(self.names())} alike in {self.seconds:.0f} s{deaths}"


def unexplained(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """Suite and check of what differs, and nobody said why."""
    return [
        (suite, name)
        for suite, run in runs.items()
        for name in run.different()
        if why(name) is None
    ]


def report(runs: Mapping[str, Run], clients: list[str]) -> str:
    """The whole page."""
    total = sum(len(run.names()) for run in runs.values())
    different = sum(len(run.different()) for run in runs.values())
    unknown = len(unexplained(runs))
    versions = ", ".join(f"{name} {version(name)}" for name in ("lmdeploy", "transformers"))
    head = _HEAD.format(
        versions=versions, python=platform.python_version(), cpus=os.cpu_count(),
        clients=", ".join(clients) or "none", total=total, same=total - different,
        explained=different - unknown, unknown=unknown,
    )  # fmt: skip
    return head + "".join(_section(name, run) for name, run in runs.items())


def _section(suite: str, run: Run) -> str:
    lines = ["", f"## {suite}", "", f"{run.when}, {run.on}: {run.summary()}.", ""]
    names = run.names()
    if names:
        lines += ["| check | plain | gateway | |", "|---|---|---|---|"]
    for name in names:
        plain, gateway = run.pair(name)
        note = ""
        if plain.seen != gateway.seen:
            note = why(name) or f"**not explained**: {gateway.said or plain.said}"
        cells = (_cell(text) for text in (name, plain.seen, gateway.seen, note))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
