"""The pretend machine of a launch, and what an engine did on it, from its timeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from turbofit.core.struct import Struct
from turbofit.core.units import round_up
from turbofit.observe.ends import End

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.pretend.scenario import Scenario
    from turbofit.pretend.timeline import TimelineReader
    from turbofit.rehearse.turbomind.ledger import Ledger

__all__ = [
    "PretendFaults",
    "PretendReader",
    "PretendReaders",
    "PretendUsage",
    "localised",
    "on_shared_cards",
    "pretend_death",
    "pretend_machine",
    "torch_death",
    "torch_environment",
    "torch_seen",
]


def localised(plan: Plan, folder: Path) -> Plan:
    """The plan with checkpoints on disk: its model's and its draft's, or header-only twins.

    Chat templates are chosen by the folder's name, so that the twin keeps the model's.

    Raises:
        UsageError: only the model's own checkpoint would do, and it is not on disk.
    """
    from turbofit.rehearse.checkpoint.twin import checkpoint_for, speculative_of

    draft = plan.settings.draft
    name = (plan.model.hub_id or plan.model.name).rpartition("/")[2]
    torch = plan.engine.on_torch
    checkpoint = checkpoint_for(plan.model, folder / name, torch=torch, draft=draft)
    source = replace(plan.model.source, checkpoint=str(checkpoint))
    made = replace(plan, model=replace(plan.model, source=source))
    if draft is None:
        return made
    here = replace(draft, model=speculative_of(draft, plan.model, folder)["model"])
    groups = [
        replace(one, settings=replace(one.settings, speculative=here)) for one in plan.by_group
    ]
    settings = replace(plan.settings, speculative=here)
    return replace(made, settings=settings, by_group=tuple(groups))


class PretendFaults(NamedTuple):
    """What goes wrong on the pretend GPUs of a launch.

    ``taken``: bytes that somebody takes of each card once the cache is sized. ``fail_at``: the
    number, from 1, of the device allocation that fails.
    """

    taken: int = 0
    fail_at: int | None = None


def pretend_machine(plan: Plan, group: int, faults: PretendFaults | None = None) -> Scenario:
    """The pretend twin of one group's GPUs.

    Terms of the ledger that only a real card has are charged to it, as a rehearsal does.
    """
    from dataclasses import replace as changed

    from turbofit.rehearse.planned import charged

    machine = charged(plan, group)
    if faults is None:
        return machine
    gpus = tuple(changed(gpu, late=gpu.late + faults.taken) for gpu in machine.gpus)
    return changed(machine, gpus=gpus, fail_at=faults.fail_at)


def on_shared_cards(machine: Scenario, plan: Plan, group: int) -> Scenario:
    """The twin of a machine that several engines share.

    What is charged to this engine beforehand is its process's then, and goes with it: everybody
    sees it, and it counts when the process first uses a card.
    """
    from dataclasses import replace as changed

    from turbofit.pretend.scenario import pretend_twin

    bare = pretend_twin(plan.machine, plan.parallel.groups[group]).gpus
    charged = [mine.used - one.used for mine, one in zip(machine.gpus, bare, strict=True)]
    gpus = tuple(changed(mine, used=one.used) for mine, one in zip(machine.gpus, bare, strict=True))
    # Over where the cards' charges differ.
    return changed(machine, gpus=gpus, context=max(charged, default=0))


def pretend_death(plan: Plan, group: int, timeline: Path) -> End | None:
    """The last refused allocation.

    None where no allocation was refused, or the timeline cannot be read.
    """
    if plan.engine.on_torch:
        return torch_death(plan, group, timeline)
    ledger = PretendReader(plan, group, timeline).ledger()
    if ledger is None or not ledger.deaths:
        return None
    death = ledger.deaths[-1]
    return End(
        kind="out_of_memory",
        gpu=plan.parallel.groups[group][death["gpu"]],
        phase=death["phase"],
        where=death["where"],
        asked=death["asked"],
        left=death["left"],
        missing=death["missing"],
        simulated=death.get("simulated"),
    )


class PretendReaders:
    """What the engines of a plan hold on their pretend GPUs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._readers: dict[int, PretendReader] = {}

    def seen(self, group: int, timeline: Path | None) -> tuple[PretendUsage, ...]:
        """What each GPU of a group held in the start with this timeline; empty without one."""
        reader = self._readers.get(group)
        if timeline is None:
            return ()
        if reader is None or reader.timeline != timeline:
            reader = self._readers[group] = PretendReader(self._plan, group, timeline)
        return reader.seen()


class PretendReader:
    """What one engine does on its pretend GPUs; each reading goes on where the last one stopped.

    The timeline is TurboMind's, which is written meanwhile; the machine's folder of other engines.
    """

    def __init__(self, plan: Plan, group: int, timeline: Path) -> None:
        self.timeline = timeline
        self._plan, self._group = plan, group
        self._machine = pretend_machine(plan, group)
        self._ledger: Ledger | None = None
        self._events: TimelineReader | None = None

    def seen(self) -> tuple[PretendUsage, ...]:
        """What each of the group's pretend GPUs held so far; empty where it cannot be read."""
        machine, group = self._machine, self._plan.parallel.groups[self._group]
        if self._plan.engine.on_torch:
            return torch_seen(group, machine, self.timeline)
        ledger = self.ledger()
        if ledger is None:
            return ()
        seen = []
        for place, index in enumerate(group):
            card, pool = ledger.cards[place], ledger.executor_pool(place)
            most = max(pool.live_peak.values(), default=0) if pool else 0
            others = machine.gpus[place].used + machine.gpus[place].late
            seen.append(
                PretendUsage(
                    gpu=index,
                    peak=others + max(card.peak.values(), default=0),
                    held=others + card.held,
                    pool=round_up(most, machine.pool_step),
                    free_at_cache=card.free_at_cache,
                    region=card.cache_region,
                )
            )
        return tuple(seen)

    def ledger(self) -> Ledger | None:
        """TurboMind's ledger so far; None where the timeline cannot be read."""
        if self._ledger is None or self._events is None:
            self._ledger, self._events = self._begin()
        try:
            return self._ledger.read(self._events.new_events())
        except (OSError, ValueError, LookupError):
            self._ledger = None  # an event may have been taken in part: the next reading is whole
            return None

    def _begin(self) -> tuple[Ledger, TimelineReader]:
        from turbofit.pretend.elf import Symbols
        from turbofit.pretend.timeline import TimelineReader
        from turbofit.rehearse.packages import engine_library
        from turbofit.rehearse.turbomind.ledger import CallSites, Ledger

        sites = CallSites(Symbols(engine_library()).name)
        ledger = Ledger(len(self._machine.gpus), sites, self._machine.pool_step)
        return ledger, TimelineReader(self.timeline)


class PretendUsage(Struct):
    """What one pretend GPU held, in bytes: at most, now, and its executor pool at most.

    ``pool`` in the steps by which a pool takes memory, as the plan counts it; None for an engine
    without such a pool.
    """

    gpu: int
    peak: int
    held: int
    pool: int | None
    free_at_cache: int | None
    region: int | None


# Engines on torch, whose pretend machine is a folder of files.


def torch_environment(
    plan: Plan, machine: Scenario, folder: Path, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment in which LMDeploy's own server finds the pretend cards; ``folder`` is new.

    Raises:
        PackageError: torch is no CUDA build.
    """
    from turbofit.pretend.environment import cuda_site, find_turbofit, put_first
    from turbofit.pretend.run import prepare
    from turbofit.rehearse.packages import SERVED, STAND_IN, need_packages

    need_packages(plan.engine.name, ray=plan.settings.tp > 1)
    path = dict(base)
    if plan.engine.of_lmdeploy:
        put_first(path, "PYTHONPATH", str(SERVED))
        find_turbofit(path)
    made = prepare(machine, folder, path, site=cuda_site())
    env = {**made.env, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if plan.settings.draft is not None:
        put_first(env, "PYTHONPATH", str(STAND_IN))
    return env


def torch_death(plan: Plan, group: int, folder: Path) -> End | None:
    """The last refused allocation, as `pretend_death` tells it."""
    from turbofit.pretend.run import PreparedRun
    from turbofit.pretend.shared import read_shared

    try:
        files = PreparedRun(folder)
        usages = {usage.pid: usage for usage in files.usages() if usage.refused}
        processes = [p for p in read_shared(files.shared).processes if p.pid in usages]
    except (OSError, ValueError, LookupError):
        return None
    if not processes:
        return None
    last = usages[max(processes, key=lambda one: one.refused_at).pid].refused[-1]
    return End(
        kind="out_of_memory",
        gpu=plan.parallel.groups[group][last.gpu],
        phase=last.phase,
        where=(last.site or "").partition(" < ")[0],
        asked=last.requested,
        left=last.left,
        missing=None if last.simulated else last.short,
        simulated=last.simulated,
    )


def torch_seen(group: Sequence[int], machine: Scenario, folder: Path) -> tuple[PretendUsage, ...]:
    """What each of a group's pretend GPUs held so far; empty where it cannot be read."""
    from turbofit.pretend.run import PreparedRun
    from turbofit.pretend.shared import read_shared

    try:
        shared = read_shared(PreparedRun(folder).shared)
    except (OSError, ValueError):
        return ()
    seen = []
    for place, index in enumerate(group):
        card = machine.gpus[place]
        others = card.used + card.late
        held = sum(size for _, size in shared.holders(place))
        seen.append(
            PretendUsage(
                gpu=index, peak=others + shared.peak[place], held=others + held, pool=None,
                free_at_cache=None, region=None,
            )
        )  # fmt: skip
    return tuple(seen)
