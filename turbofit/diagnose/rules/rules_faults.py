"""TurboMind's other ends: driver errors, its own checks, NCCL, requests that it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.diagnose.lines.events import KnownMessage
from turbofit.diagnose.rules.causes import matches
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.observe.turbomind_log import (
    CheckFailed,
    CudaError,
    Frame,
    NcclError,
    RequestRejected,
    Slab,
    WarmupFinished,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogEvent, LogFacts

__all__ = ["other_faults", "rejections", "stack_names"]


def stack_names(facts: LogFacts, mark: LogEvent) -> list[str]:
    """The stack after a fault, innermost first, without what only checks."""
    at = facts.marks.index(mark)
    names = []
    for later in facts.marks[at + 1 :]:
        if isinstance(later.event, Frame):
            names.append(later.event.name)
        elif names:
            break
    return [name for name in names if not name.startswith("TM_")]


def other_faults(case: LogCase) -> Iterator[RuleAnswer]:
    """Driver errors, checks and NCCL."""
    facts = case.facts
    communicator = facts.subject.options.get("communicator")
    for mark, event in facts.every(CudaError):
        if event.out_of_memory:
            continue
        names = " ".join(stack_names(facts, mark))
        ipc = communicator in ("cuda-ipc", "native") or "CudaIpc" in names or event.driver
        peers = any(w in event.message for w in ("device ordinal", "peer", "invalid")) and ipc
        if peers and not facts.before(mark, Slab):
            yield _no_peers(case, mark)
        else:
            yield RuleAnswer(
                kind="cuda_error",
                phase="serving" if facts.before(mark, WarmupFinished) else "unknown",
                what=f"a CUDA call failed and LMDeploy aborted: {event.message}",
                line=mark.line,
                evidence=(evidence(mark, "the error; it is not about memory"),),
                unknown=("why: such errors come from the driver, the hardware or a bug",),
                changes=("see `turbofit doctor` and dmesg for Xid lines",),
            )
    for mark, check in facts.every(CheckFailed):
        yield RuleAnswer(
            kind="check_failed",
            phase="configuration",
            what=f"one of TurboMind's own checks failed and it aborted: {check.message}",
            line=mark.line,
            evidence=(evidence(mark, "the check"),),
            planned=True,
        )
    for mark, nccl in facts.every(NcclError):
        yield RuleAnswer(
            kind="nccl_error",
            phase="communication",
            what=f"NCCL failed between the GPUs: {nccl.message}",
            line=mark.line,
            rank="consequence" if _died_before(facts, mark) else "cause",
            evidence=(evidence(mark, "NCCL's own words"),),
            changes=("try NCCL_P2P_DISABLE=1, and NCCL_DEBUG=INFO for its reasons",),
        )


def _no_peers(case: LogCase, mark: LogEvent) -> RuleAnswer:
    options = case.facts.subject.options
    return RuleAnswer(
        kind="no_peer_access",
        phase="peer access",
        what="the cuda-ipc communicator needs peer access between all GPUs of the group, and they"
        " have none",
        line=mark.line,
        why=(
            "each rank maps every other rank's buffers; without peer access the driver refuses and"
            " LMDeploy has no way around it",
        ),
        evidence=(evidence(mark, "the driver's refusal"),),
        changes=(
            f"--communicator nccl instead of {options.get('communicator', 'cuda-ipc')}: it goes"
            " through host memory",
            "or one replica a card, where the model fits on one",
        ),
        planned=True,
    )


def _died_before(facts: LogFacts, failed: LogEvent) -> bool:
    """Whether memory was missing; NCCL names its reason after the error that torch makes of it."""
    return any(m.line < failed.line for m, e in facts.every(CudaError) if e.out_of_memory) or any(
        cause.kind == "out_of_memory"
        for mark, _ in facts.every(KnownMessage)
        for cause, _ in matches(mark.text)
    )


def rejections(case: LogCase) -> Iterator[RuleAnswer]:
    """Requests that no cache of this size can ever hold: the server lives on."""
    for mark, event in case.facts.every(RequestRejected):
        yield RuleAnswer(
            kind="request_rejected",
            phase="serving",
            what=f"request {event.request} was refused: the whole cache cannot hold its prompt",
            line=mark.line,
            rank="notice",
            why=("its client got an HTTP 500; the server lives on",),
            evidence=(evidence(mark, "the refusal"),),
            changes=("a larger cache (more --cache-max-entry-count, --tp, int8 KV)",),
            planned=True,
        )
        return
