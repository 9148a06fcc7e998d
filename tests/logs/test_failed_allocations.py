"""One allocation of the real engine fails, in each of 24 lives: each end is named, none hangs.

Other engines, formats and degrees are in bench/faults/ALLOCATIONS.md.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.rehearsal.pretend.child import events_of
from tests.support.checkpoints import write_checkpoint
from turbofit.core.units import MIB
from turbofit.logs.explain import diagnose
from turbofit.rehearsal.engines import REHEARSED_ENGINES
from turbofit.rehearsal.notes import NOT_FINISHED
from turbofit.rehearsal.packages import engine_library
from turbofit.rehearsal.pretend.elf import Symbols
from turbofit.rehearsal.pretend.process_memory import CallSites, ProcessMemory
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario
from turbofit.rehearsal.pretend.usage import PINNED
from turbofit.rehearsal.run import EndedRun, run_child
from turbofit.rehearsal.spec import RehearsalCase, RehearsalRequest, Spec

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

MODEL, LIVES, PAGE_LOCKED = "internvl2-1b", 24, 4
CARD = PretendGpu("NVIDIA GeForce RTX 3090", total=24268 * MIB, used=400 * MIB)
SETTINGS = {
    "tp": 1, "max_batch_size": 16, "max_prefill_token_num": 2048, "session_len": 8192,
    "cache_max_entry_count": 0.5, "communicator": "nccl",
}  # fmt: skip
VISION = re.compile(r"Vit|Vision|vision|visual")
#: Nobody else is on the card.
BLAMES = ("held by somebody else", "end what else holds")


class Allocation(NamedTuple):
    """By the engine's own timeline; ``phases`` are what a diagnosis may call its phase."""

    number: int
    pinned: bool
    phases: tuple[str, ...]
    failed: bool


@cache
def symbols() -> Symbols:
    return Symbols(engine_library())


def allocations(life: EndedRun) -> Iterator[Allocation]:
    sites, counts = CallSites(symbols().name), [0, 0]
    memory = ProcessMemory(1, CallSites(symbols().name), Scenario(gpus=(CARD,)).pool_step)
    timelines = life.folder / "pretend" / "timelines"
    for event in events_of(timelines / f"{life.notes['pid']}.timeline"):
        memory.read((event,))
        if event.tag not in "AE":
            continue
        pinned = event.number(1) == PINNED
        counts[pinned] += 1
        pool = memory.pools.get(event.number(2))
        forward = pool is not None and pool.owner == "executor"
        phase = memory.cards[event.number(0)].phase
        names = said(phase, sites.site(event.trace), pinned=pinned, forward=forward)
        yield Allocation(counts[pinned], pinned, names, event.tag == "E")


def said(phase: str, site: str, *, pinned: bool, forward: bool) -> tuple[str, ...]:
    if pinned:
        return ("host RAM",)
    if phase.startswith(("case", "ready")):
        return ("vision",) if VISION.search(site) else ("text",)
    if phase in ("buffers", "engine", "cache", "sizing"):
        return ("warm-up",) if forward else ("cache",)
    # A step of a warm-up that TurboMind computes ahead may end when its log calls it finished.
    return ("warm-up", "text") if phase == "warm-up" else ("weights",)


def drawn(found: list[Allocation], count: int) -> list[Allocation]:
    """The first and the middle one of each phase, and others at random.

    Which allocation is a phase's last depends on threads that race.
    """
    chance, chosen = random.Random(26), dict[Allocation, None]()
    for phases in dict.fromkeys(one.phases for one in found):
        alike = [one for one in found if one.phases == phases]
        chosen |= {alike[0]: None, alike[len(alike) // 2]: None}
    while len(chosen) < count:
        chosen[chance.choice(found)] = None
    return list(chosen)[:count]


def lived(folder: Path, checkpoint: Path, **fails: int) -> EndedRun:
    """A start, the warm-up and a request of the largest image."""
    folder.mkdir()
    request = RehearsalRequest(units=(13,), text_tokens=100)
    spec = Spec(
        machine=replace(Scenario(gpus=(CARD,)), **fails), model_dir=str(checkpoint),
        settings=SETTINGS, cases=(RehearsalCase("worst", (request,)),), case_seconds=30.0,
    )  # fmt: skip
    adapter = REHEARSED_ENGINES[spec.engine]
    return run_child(spec, folder, adapter.environ, adapter.path)


def test_each_failing_allocation_has_a_name(tmp_path: Path) -> None:
    checkpoint = tmp_path / MODEL
    write_checkpoint(MODEL, checkpoint)
    whole = lived(tmp_path / "whole", checkpoint)
    assert whole.notes.get("done"), whole.log[-20:]
    found = list(allocations(whole))
    device = [one for one in found if not one.pinned]
    locked = [one for one in found if one.pinned]
    wrong = {}
    for tried in (*drawn(device, LIVES - PAGE_LOCKED), *drawn(locked, PAGE_LOCKED)):
        folder = tmp_path / f"{tried.number}-{tried.pinned}"
        name = "fail_pinned_at" if tried.pinned else "fail_at"
        life = lived(folder, checkpoint, **{name: tried.number})
        failed = next(one for one in allocations(life) if one.failed)
        why = judged(life, failed)
        if why:
            wrong[str(failed)] = why
    assert wrong == {}


def judged(life: EndedRun, failed: Allocation) -> str:
    """What is wrong with an end; nothing is where the engine went on and answered."""
    if life.stopped:
        return life.stopped
    if life.notes.get("done"):
        unfinished = [case for case in life.notes["cases"] if NOT_FINISHED in case["statuses"]]
        return f"not finished: {unfinished}" if unfinished else ""
    log = "\n".join(line for line in life.log if not line.startswith("turbofit pretend:"))
    command = f"lmdeploy==0.18.0\n$ lmdeploy serve api_server {MODEL} --tp 1\n".encode()
    answer = diagnose([command, log.encode()], on="1xrtx3090:used=400MiB")
    kind = "host_out_of_memory" if failed.pinned else "out_of_memory"
    text = " ".join((answer.what, *answer.why, *answer.changes))
    if any(word in text for word in BLAMES):
        return f"blames somebody who is not there: {text}"
    named = (answer.kind, answer.phase)
    return "" if named[0] == kind and named[1] in failed.phases else f"named {named}"
