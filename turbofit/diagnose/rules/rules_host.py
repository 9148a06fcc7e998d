"""Rules for messages of the kernel and the shell, known messages, and logs without a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.messages import plural
from turbofit.core.units import format_bytes
from turbofit.diagnose.answer import Holding, Missing
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.figures import explanation_of
from turbofit.observe.engine_end import diagnosed, told_kind
from turbofit.observe.log_events import (
    HostKill,
    PeerMissing,
    ServerFigures,
    ServerUp,
    WarmupFinished,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent


def host_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields kills by the kernel's OOM killer, and the answers of rows of `presets/causes.yaml`."""
    facts = case.facts
    for mark, kill in facts.every(HostKill)[:1]:
        size = f" of {format_bytes(kill.rss)}" if kill.rss is not None else ""
        limit = "the machine's RAM ran out"
        if kill.group:
            limit = "its container's or service's memory limit was reached"
        yield RuleAnswer(
            kind=diagnosed(told_kind(kill)),
            phase="host RAM",
            what=f"the kernel killed {kill.name or 'a process'}[{kill.pid}]{size}: {limit}",
            line=mark.line,
            held=(Holding(who=f"{kill.name}[{kill.pid}]", bytes=kill.rss, lines=(mark.line,)),),
            missing=Missing(bytes=None, basis="unknown", note="the kernel does not say how much"),
            evidence=(evidence(mark, "the kernel's killer and its victim"),),
            changes=("more RAM or a higher memory limit of the container; fewer replicas",),
            planned=True,
        )
    for mark in case.event.marks:
        short = getattr(mark.event, "out_of_memory", False)
        if not short and (row := explanation_of(mark, case)):
            yield row


def quiet_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields the answers for a log in which no fault was found."""
    ready, peers = _ready(case), case.facts.first(PeerMissing)
    if ready:
        yield RuleAnswer(
            kind="healthy",
            phase="none",
            what="nothing failed in this log: the engine started",
            line=ready.line,
            rank="notice",
            why=tuple(_failed_requests(case)),
            evidence=(evidence(ready, "the engine is ready"),),
        )
    if peers:
        yield RuleAnswer(
            kind="peer_warning",
            phase="peer access",
            what="only a warning: these GPUs have no peer access to each other",
            line=peers.line,
            rank="notice",
            why=(peer_meaning(),),
            evidence=(evidence(peers, "the warning of LMDeploy up to 0.7.3"),),
            planned=True,
        )


def _ready(case: LogCase) -> LogEvent | None:
    """The line by which an engine started or a server answers, if no later line complains."""
    facts, mood = case.facts, case.facts.mood
    up = facts.first(ServerUp) or facts.first(WarmupFinished)
    # A server's log may start after its start: then a possible refusal counts as trouble, too.
    troubles = (*case.event.marks, mood.last_complaint, None if up else mood.last_refusal)
    counted = facts.every(ServerFigures)
    ready = up or mood.answered or next((mark for mark, one in counted if one.succeeded), None)
    last = max((mark.line for mark in troubles if mark), default=0)
    calm = ready is not None and case.event.outcome != "fatal" and last <= ready.line
    return ready if calm else None


def _failed_requests(case: LogCase) -> Iterator[str]:
    """Yields the meaning of LMDeploy's count of failed requests, if it counts any."""
    counted = case.facts.every(ServerFigures)
    if counted and (failed := counted[-1][1].failed):
        yield (
            f"LMDeploy counts {failed} {plural(failed, 'request')} as failed: clients that left"
            " before their answer are among these, and no line tells of an error"
        )


def peer_meaning() -> str:
    return (
        "without peer access NCCL goes through host memory: tensor parallelism works and takes no"
        " more GPU memory, but is slower, often slower than one card; the communicators cuda-ipc"
        " and native do not work at all"
    )
