"""The kernel's and the shell's words, known messages, and logs in which nothing failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import format_bytes
from turbofit.diagnose.answer import Holding, Missing
from turbofit.diagnose.lines.events import HostKill, KnownMessage, PeerMissing, SmiGpu, SmiProcess
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.figures import told
from turbofit.diagnose.rules.rules_versions import is_of_versions
from turbofit.observe.turbomind_log import PythonError, ServerUp, WarmupFinished

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogEvent, LogFacts

__all__ = ["host_rules", "quiet_rules"]


def host_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """The kernel's OOM killer, known messages, and Python errors that nothing else explains."""
    facts = case.facts
    for mark, kill in facts.every(HostKill)[:1]:
        size = f" of {format_bytes(kill.rss)}" if kill.rss is not None else ""
        limit = (
            "its container's or service's memory limit was reached"
            if kill.group
            else ("the machine's RAM ran out")
        )
        yield RuleAnswer(
            kind="host_out_of_memory",
            phase="host RAM",
            what=f"the kernel killed {kill.name or 'a process'}[{kill.pid}]{size}: {limit}",
            line=mark.line,
            held=(Holding(who=f"{kill.name}[{kill.pid}]", bytes=kill.rss, lines=(mark.line,)),),
            missing=Missing(bytes=None, basis="unknown", note="the kernel does not say how much"),
            why=(
                "host memory, not GPU memory: weights on their way to the GPUs, images being"
                " preprocessed, page-locked buffers of each rank (LMDeploy 0.16 and 0.17: 18.7 GiB"
                " a rank for InternVL)",
            ),
            evidence=(evidence(mark, "the kernel's killer and its victim"),),
            changes=(
                "more RAM or a higher memory limit of the container; fewer replicas; LMDeploy 0.18",
            ),
            planned=True,
        )
    for mark, _ in facts.every(KnownMessage):
        found = told(mark.text, case)
        if found is None or (found.cause.rank != "notice" and _starts_after(facts, mark)):
            continue
        cause = found.cause
        yield RuleAnswer(
            kind=cause.kind,
            phase=cause.phase,
            what=found.what,
            line=mark.line,
            rank=cause.rank,
            why=found.why,
            evidence=(evidence(mark, "the message"),),
            changes=found.changes,
            planned=cause.planned,
            missing=found.missing,
            unknown=cause.unknown,
        )
    for mark, error in facts.every(PythonError):
        if draft := _python(mark, error):
            yield draft


def _starts_after(facts: LogFacts, mark: LogEvent) -> bool:
    """Whether an engine is ready after a mark."""
    ready = (*facts.every(ServerUp), *facts.every(WarmupFinished))
    return any(later.line > mark.line for later, _ in ready)


def _python(mark: LogEvent, error: PythonError) -> RuleAnswer | None:
    """Errors whose name or words say enough."""
    lines = (evidence(mark, "the traceback's last line"),)
    if error.out_of_memory or "CUDA out of memory" in error.message:
        return RuleAnswer(
            kind="out_of_memory",
            phase="unknown",
            what="a CUDA call ran out of memory, the GPU's or page-locked memory of the host,"
            " outside torch's allocator",
            line=mark.line,
            missing=Missing(bytes=None, basis="unknown", note="the error has no sizes"),
            changes=("free the card, or leave more room beside the cache; free host memory",),
            unknown=("which of the two it was: the error does not say",),
            evidence=lines,
            planned=True,
        )
    names = ("ModuleNotFoundError", "ImportError")
    if error.name.rpartition(".")[2] in names and not is_of_versions(mark, error):
        return RuleAnswer(
            kind="missing_package",
            phase="configuration",
            what=f"a Python package or library is missing: {error.message}",
            line=mark.line,
            changes=("install it in the environment that runs the program",),
            evidence=lines,
        )
    return None


def quiet_rules(case: LogCase) -> Iterator[RuleAnswer]:
    """What remains to be said where no fault was found."""
    facts = case.facts
    gpus = facts.every(SmiGpu)
    processes = facts.every(SmiProcess)
    if gpus and any(event.total for _, event in gpus):
        held = [
            Holding(who=f"{e.name}[{e.pid}]", bytes=e.used, gpu=e.gpu, lines=(mark.line,))
            for mark, e in processes
        ]
        for mark, gpu in gpus:
            seen = sum(e.used or 0 for _, e in processes if e.gpu == gpu.index)
            rest = (gpu.used or 0) - seen
            if rest > 0:
                who = "nobody in the table (another container, or the driver)"
                held.append(Holding(who=who, bytes=rest, gpu=gpu.index, lines=(mark.line,)))
        yield RuleAnswer(
            kind="memory_table",
            phase="none",
            what="no failure in this log: an nvidia-smi table, which says who holds the cards",
            line=gpus[0][0].line,
            rank="notice",
            held=tuple(held),
            evidence=tuple(evidence(mark, "a card and its memory") for mark, _ in gpus),
            planned=case.model is not None,
        )
    up = facts.first(ServerUp) or facts.first(WarmupFinished)
    if up:
        yield RuleAnswer(
            kind="healthy",
            phase="none",
            what="no failure in this log: the engine started",
            line=up.line,
            rank="notice",
            evidence=(evidence(up, "the engine is ready"),),
        )
    peers = facts.first(PeerMissing)
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


def peer_meaning() -> str:
    """What missing peer access means."""
    return (
        "without peer access NCCL goes through host memory: tensor parallelism works and takes no"
        " more GPU memory, but is slower, often slower than one card; the communicators cuda-ipc"
        " and native do not work at all"
    )
