"""The memory of a process: the sums of its timeline by phase and by call."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rehearsal.pretend.child import events_of
from turbofit.rehearsal.pretend.process_memory import LOADER, STAGING, CallSites, ProcessMemory
from turbofit.rehearsal.pretend.usage import Event
from turbofit.rehearsal.turbomind.readings import card_terms, load_peak

_NAMES = {
    1: "core::CudaMemPoolAllocator::allocate",
    2: "?",
    3: "LlamaLinear::Forward",
    4: "InternVit::Impl::Attn",
    5: "ModelExecutor::Impl::InternalThreadEntry",
    6: "TurboMind::Impl::CreateEngine",
}


@pytest.fixture
def sites() -> CallSites:
    return CallSites(_NAMES.__getitem__)


def test_sites(sites: CallSites) -> None:
    assert sites.site((1, 2, 3, 4, 5)) == "linear output in InternVit::Impl::Attn"
    assert (sites.site((1, 4, 5)), sites.site((1, 2))) == ("InternVit::Impl::Attn", LOADER)
    assert sites.site(()) == STAGING
    assert sites.owner((1, 5)) == "executor"
    assert sites.owner((1, 6)) == "rank context"


def _events(text: str) -> list[Event]:
    events = []
    for line in text.strip().splitlines():
        tag, *words = line.split()
        trace: tuple[int, ...] = ()
        if words and words[-1].startswith("@"):
            trace = tuple(int(c) for c in words.pop()[1:].split(",") if c)
        events.append(Event(tag, tuple(words), trace))
    return events


_RUN = """
P context
A 0 2 -1 18 18 v1 @6
P weights
A 0 1 0 100 118 a1 @1,2
P prepare
A 0 1 0 50 168 a2 @1,2
F a2 168
P engine
G 0 500 1000 @6
C 0 1 @6
A 0 1 1 400 568 b1 @1,6
R 0 0 100 518
A 0 1 1 20 538 b2 @1,6
C 0 2 @5
A 0 1 2 30 568 c1 @1,4,5
F c1 568
P ready
P case_x
A 0 1 2 70 608 c2 @1,4,5
O 0 1 2 999 392 929 @1,4,5
"""


def test_phases_pools_and_terms(sites: CallSites) -> None:
    events = _events(_RUN)
    memory = ProcessMemory(1, sites, pool_step=10).read(events)
    card = memory.cards[0]
    assert (card.free_at_cache, card.cache_region) == (500, 400)
    assert card_terms(memory, 0) == {
        "weights": 100, "load_temporaries": 50, "kv_cache": 400, "buffers": 20, "pool_warmup": 30,
    }  # fmt: skip
    assert load_peak(memory, 0) == 168
    # Of what was not reached there are no terms.
    died = ProcessMemory(1, sites, pool_step=10).read(_events("P context\nO 0 0 -1 5 1 5 @6"))
    assert card_terms(died, 0) == {}
    assert memory.pools[2].live_peak["case_x"] == 70
    (death,) = memory.deaths
    assert death["phase"] == "case_x"
    assert (death["asked"], death["left"], death["missing"]) == (999, 392, 537)
    assert death["where"] == "InternVit::Impl::Attn"
    # Read in parts it is the same.
    for cut in range(len(events)):
        parts = ProcessMemory(1, sites, pool_step=10).read(events[:cut]).read(events[cut:])
        assert (parts.cards, parts.pools) == (memory.cards, memory.pools)
        assert (parts.phases, parts.deaths) == (memory.phases, memory.deaths)


def test_a_process_has_phases_contexts_and_the_line_of_its_refusal(tmp_path: Path) -> None:
    path = tmp_path / "7.timeline"
    path.write_text(
        """I 7 3 1,0
N python  train.py --x
K 1 100 900 @
P load weights
A 1 0 -1 512 512 9c @
A 1 3 -1 4096 4096 aa @
P step
A 1 1 0 1024 1536 9d @
F 9c 1024
A 1 0 -1 200 1224 9f @
R 1 0 0 200
P end
S before.py:1
O 1 0 -1 9000 500 8500 @
S big.py:9
"""
    )
    seen = ProcessMemory(2, None, pool_step=512).read(events_of(path))
    assert (seen.pid, seen.parent, seen.command) == (7, 3, "python  train.py --x")
    card = seen.cards[1]
    assert card.peak == {"load weights": 512, "step": 1536, "end": 200}
    assert card.end == {"load weights": 512, "step": 200, "end": 200}
    assert [card.context for card in seen.cards] == [0, 100]
    (death,) = seen.deaths
    assert (death["asked"], death["left"], death["missing"]) == (9000, 500, 8000)
    assert (death["phase"], death["where"]) == ("end", "big.py:9")
    assert death["memory_kind"] == "cudaMalloc"
    empty = ProcessMemory(1, None, 1).read(())
    assert (empty.pid, empty.cards[0].end) == (0, {})
