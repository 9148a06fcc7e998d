"""How little a plan takes, and how many servers like it the same GPUs hold."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from turbofit.core.footprint import Footprint
from turbofit.core.machine import Gpu, Machine
from turbofit.core.messages import plural
from turbofit.core.plan import GpuLedger, HostMemory
from turbofit.core.units import format_bytes
from turbofit.memory.account import Account
from turbofit.memory.engine import Engine
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import Evaluation
from turbofit.tuner.search.sizing import Memo, Sizer

__all__ = ["engines_held", "footprint_of", "footprint_words"]


def footprint_of(
    request: ResolvedRequest, accounts: Sequence[Account], servers: int | None
) -> Footprint:
    """What engines take of each GPU, and what is left.

    Args:
        request: what was asked.
        accounts: of all engines.
        servers: as :func:`engines_held` counts them; None where nobody does.
    """
    taken: dict[int, int] = {}
    left: list[int] = []
    for account in accounts:
        ratio = account.settings.cache_max_entry_count
        indices = [gpu.index for gpu in account.gpus]
        taken.update(zip(indices, account.taken_at(ratio), strict=True))
        for gpu, ledger in zip(account.gpus, account.at(ratio).ledgers, strict=True):
            # A budget withholds memory from this turbofit, and from no other.
            margin = min(ledger.margin, request.margin.of(gpu))
            left.append(ledger.headroom - margin)
    each = tuple(taken[index] for index in sorted(taken))
    return Footprint(taken=each, left=min(left), servers=servers)


def footprint_words(footprint: Footprint) -> str:
    """What is left for others, as a clause of a verdict."""
    count, left = footprint.servers, format_bytes(footprint.left)
    words = f"{left} of it beyond the margin, for others"
    if count is None:
        return words
    where = plural(len(footprint.taken), "GPU")
    holds = "holds" if where == "GPU" else "hold"
    return f"{words}; the {where} {holds} {count:,} such {plural(count, 'engine')} in all"


def engines_held(
    request: ResolvedRequest, best: Evaluation, engine: Engine, host: HostMemory
) -> int:
    """How many engines like a plan's its GPUs and the host hold, those of the plan included.

    Args:
        request: what was asked.
        best: the shape that was chosen, which fits.
        engine: the engine generation.
        host: what all its engines take of the host.
    """
    groups = best.shape.groups
    count = sum(_engines_on(request, best.of_group(group), group, engine) for group in groups)
    need = (host.pinned + host.pageable) / len(groups)
    if host.available is None or not need:
        return count
    return min(count, int(host.available / need))


def _engines_on(
    request: ResolvedRequest, part: Evaluation, group: tuple[int, ...], engine: Engine
) -> int:
    """How many engines like one that fits its group holds, started one after the other.

    Each is sized for what those before it leave free in their worst case. Under: all have the first
    one's options but for the ratio.
    """
    shape = replace(part.shape, groups=(group,), tp=len(group), prefills=())
    tokens, count = part.settings.session_len, 0
    while True:
        sizer = Sizer(request, shape, part.settings.dtype, part.vision_load, engine, Memo())
        outcome = sizer.outcome(tokens)
        if outcome.short or outcome.ratio is None:
            return count
        (account,) = sizer.accounts(tokens)
        machine = _with_used(request.machine, account.at(outcome.ratio).ledgers)
        request = replace(request, machine=machine)
        count += 1


def _with_used(machine: Machine, ledgers: Sequence[GpuLedger]) -> Machine:
    """The machine while an engine is in its worst case."""
    peaks = {ledger.index: ledger.peak for ledger in ledgers}

    def held(gpu: Gpu) -> Gpu:
        if gpu.index not in peaks:
            return gpu
        usable = gpu.usable
        return replace(gpu, used=peaks[gpu.index], free=usable - peaks[gpu.index])

    return replace(machine, gpus=tuple(map(held, machine.gpus)))
