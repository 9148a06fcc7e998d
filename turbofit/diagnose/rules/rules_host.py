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
    CheckFailed,
    CudaError,
    HostKill,
    KnownMessage,
    LegacyCuda,
    NcclError,
    PeerMissing,
    ServerFigures,
    ServerUp,
    WarmupFinished,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase

#: Events that are compared with the rows of `presets/causes.yaml`.
_ASKED = (KnownMessage, CudaError, CheckFailed, NcclError, LegacyCuda)


def host_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields kills by the kernel's OOM killer, and the answers of rows of `presets/causes.yaml`."""
    facts = case.facts
    for mark, kill in facts.every(HostKill)[:1]:
        size = f" of {format_bytes(kill.rss)}" if kill.rss is not None else ""
        of_group = "its container's or service's memory limit was reached"
        limit = of_group if kill.group else "the machine's RAM ran out"
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
        if isinstance(mark.event, _ASKED) and not short and (row := explanation_of(mark, case)):
            yield row


def quiet_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields the answers for a log in which no fault was found."""
    yield from _healthy(case)
    peers = case.facts.first(PeerMissing)
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


def _healthy(case: LogCase) -> Iterator[RuleAnswer]:
    """Yields that an engine started or a server answers, if no later line complains."""
    facts, mood = case.facts, case.facts.mood
    counted = facts.every(ServerFigures)
    up = facts.first(ServerUp) or facts.first(WarmupFinished)
    # A server's log may start after its start: then a possible refusal counts as trouble, too.
    troubles = (*case.event.marks, mood.last_complaint, None if up else mood.last_refusal)
    answers = next((mark for mark, figures in counted if figures.succeeded), None)
    up = up or mood.answered or answers
    last = max((mark.line for mark in troubles if mark), default=0)
    if up and case.event.outcome != "fatal" and last <= up.line:
        failed = counted[-1][1].failed if counted else 0
        yield RuleAnswer(
            kind="healthy",
            phase="none",
            what="nothing failed in this log: the engine started",
            line=up.line,
            rank="notice",
            why=_not_ended(failed),
            evidence=(evidence(up, "the engine is ready"),),
        )


def _not_ended(requests: int) -> tuple[str, ...]:
    """The meaning of LMDeploy's count of failed requests; empty if the count is 0."""
    if not requests:
        return ()
    return (
        f"LMDeploy counts {requests} {plural(requests, 'request')} as failed: clients that left"
        " before their answer are among these, and no line tells of an error",
    )


def peer_meaning() -> str:
    return (
        "without peer access NCCL goes through host memory: tensor parallelism works and takes no"
        " more GPU memory, but is slower, often slower than one card; the communicators cuda-ipc"
        " and native do not work at all"
    )
