"""Who held a card when torch ran out of memory: this process, others, or nobody that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.units import GIB
from turbofit.diagnose.answer import Holding
from turbofit.machine.presets import context_bytes
from turbofit.observe.log_events import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogEvent
    from turbofit.observe.log_events import TorchMemory

#: How to tell a server's processes from others.
_HOW: Final = (
    "To tell: start the server, and compare the pids of `docker top NAME` (or of `pgrep -af"
    " lmdeploy`) with those of `nvidia-smi --query-compute-apps=pid,used_memory --format=csv` on"
    " the host"
)


def unclear(case: LogCase, memory: TorchMemory) -> bool:
    """Whether this process may be one of those that the text lists by pid.

    LMDeploy allocates outside torch, so that torch's figures do not tell which of two it is.
    """
    return not memory.named or (
        memory.pid is not None
        and case.facts.subject.lmdeploy
        and any(size > (memory.process or 0) for _, size in memory.others)
    )


def holders(case: LogCase, mark: LogEvent, memory: TorchMemory) -> Iterator[Holding]:
    """Each process with its bytes, as sure as the text is."""
    lines, gpu = (mark.line,), memory.gpu
    either = unclear(case, memory)
    if either:
        known = () if memory.pid is None else ((memory.pid, memory.process or 0),)
        for pid, size in (*known, *memory.others):
            yield Holding(
                who=f"process {pid}: this one or another", bytes=size, gpu=gpu, lines=lines
            )
        return
    if memory.process is not None:
        listed = "" if memory.pid is None else f" (process {memory.pid} of the text)"
        yield Holding(who=f"this process{listed}", bytes=memory.process, gpu=gpu, lines=lines)
    elif memory.allocated is not None:
        yield Holding(who="this process's tensors", bytes=memory.allocated, gpu=gpu, lines=lines)
    for pid, size in memory.others:
        yield Holding(who=f"process {pid}", bytes=size, gpu=gpu, lines=lines)


def unexplained(case: LogCase, memory: TorchMemory) -> int:
    """Bytes of the card that no process of the text explains, a CUDA context of this one aside.

    Up to torch 2.0 the process's figure leaves its context out. So much of the rest as a context
    can take counts as one: a card shared with something that small is planned as an empty one.
    """
    if memory.total is None or memory.process is None or memory.free is None:
        return 0
    rest = memory.total - memory.process - memory.free - sum(size for _, size in memory.others)
    if memory.context:
        return max(0, rest)
    if rest <= CONTEXT:
        return 0
    return rest - (context_bytes(case.gpu)[0] if case.gpu else CONTEXT)


def foreign(case: LogCase, memory: TorchMemory) -> int:
    """Bytes of the card that a plan must do without; none where they may be this process's.

    What is unclear counts as this process's: the plan is for the card without it, and says so.
    """
    if unclear(case, memory):
        return 0
    rest = sum(size for _, size in memory.others) + unexplained(case, memory)
    return rest if rest > GIB // 4 else 0


def doubts(case: LogCase, memory: TorchMemory) -> Iterator[str]:
    """Both readings of a pid, and how to tell them apart."""
    pids = ", ".join(str(pid) for pid, _ in memory.others)
    if unclear(case, memory) and memory.pid is None:
        yield (
            f"which of the processes {pids} is this one: torch lists every process of the card and"
            f" names none as this one. The plan is for the card without others. {_HOW}"
        )
    elif unclear(case, memory):
        yield (
            f"which process is this one: {memory.pid} by torch's figures, or {pids}, since LMDeploy"
            f" allocates outside torch. The plan is for the card without others. {_HOW}"
        )
    elif memory.pid is not None and memory.outside_torch:
        yield (
            f"whether process {memory.pid} is this server. Torch lists every process of the card:"
            " the only one is this one, under the host's pid if it ran in a container, and to end"
            " it ends the server. It is another program only if the driver did not list this one."
            f" {_HOW}"
        )


def what_to_end(case: LogCase, memory: TorchMemory) -> Iterator[str]:
    """Others that hold the card: always with the condition that they are others."""
    others = sum(size for _, size in memory.others)
    if others <= GIB // 4:
        return
    pids = ", ".join(str(pid) for pid, _ in memory.others)
    if unclear(case, memory):
        yield (
            "tell this server's processes from others first (see what is unknown); end a process"
            " only if it is another program's, or plan for what is free"
        )
    else:
        yield (
            f"end what else holds the card (process {pids}) if it is no part of this server, or"
            " plan for what is free"
        )
