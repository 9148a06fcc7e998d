"""The formula against what the 0.18.0 binary allocated on pretend GPUs (bf16, batch 128, F = 8320).

Each row is one run of LMDeploy's own `_turbomind` on a card of 24268 MiB, 300 of them used by
others, at ratio 0.8. That run has no CUDA context, no NCCL and no driver rounding, so the account's
`estimate` terms are left out of the comparison. The pools of those pretend GPUs grew by 2 MiB, and
so do the account's here: its sums are the engine's to a page. All figures in MiB per rank.
"""

from __future__ import annotations

from functools import partial

import pytest

import turbofit
from tests.memory.conftest import Case as AnyCase
from turbofit.core.errors import NoKernelError
from turbofit.core.plan import GpuLedger
from turbofit.core.units import MIB

USABLE = 24268 - 300
Case = partial(AnyCase, step=2)

SHORT = {"dtype": "float16", "session_len": 4096}
# model, tp, changed settings, weights, free at sizing, cache, held after start, pool after warm-up
STARTS = [
    ("internvl2-8b", 1, {}, 15402.54, 8564, 6851.2, 22972, 585.0),
    ("internvl2-8b", 2, {}, 7703.3, 16264, 13011.2, 21174, 292.5),
    ("internvl2-8b", 4, {}, 3853.72, 20114, 16091.2, 20274, 178.75),
    ("internvl2-8b", 4, {"communicator": "cuda-ipc"}, 3853.74, 20096, 16076.8, 20278, 178.75),
    ("internvl2-8b-awq", 1, {"dtype": "float16"}, 5626.5, 18116, 14492.8, 20836, 585.0),
    ("internvl2-26b", 4, {}, 14812.9, 9154, 7323.2, 22552, 227.5),
    ("internvl2-26b-awq", 2, {"dtype": "float16"}, 12983.8, 10792, 8633.6, 22190, 357.5),
    ("internvl2-40b-awq", 2, SHORT, 16535.8, 7150, 5720.0, 22696, 216.0),
    ("internvl2-40b-awq", 4, SHORT, 10032.8, 13794, 11035.2, 21400, 136.0),
    ("qwen2-vl-7b", 1, {}, 16054.68, 7912, 6329.6, 23226, 715.0),
    ("qwen2-vl-7b", 4, {}, 4016.5, 19950, 15960.0, 20326, 207.2),
]
IDS = [f"{row[0]}-tp{row[1]}-{row[2].get('communicator', 'nccl')}" for row in STARTS]


def without_estimates(ledger: GpuLedger, *phases: str) -> float:
    terms = (t for t in ledger.terms if t.phase in phases and t.basis != "estimate")
    return sum(term.bytes for term in terms) / MIB


@pytest.mark.parametrize(
    ("model", "tp", "changes", "weights", "free", "cache", "held", "pool"), STARTS, ids=IDS
)
def test_start_as_the_engine_allocated_it(model, tp, changes, weights, free, cache, held, pool):
    account = Case(model, tp).account(**changes)
    ledger = account.ledgers_at(0.8)[-1]  # the last rank: no staging, fewer handles
    classes = [
        t for t in ledger.terms if t.term.startswith("weights.") and "rounding" not in t.term
    ]
    assert sum(t.bytes for t in classes) / MIB == pytest.approx(weights, abs=0.3)

    before = without_estimates(ledger, "context", "weights")
    assert USABLE - before == pytest.approx(free, abs=max(1.0, 0.0005 * before))
    assert account.free <= free * MIB  # estimates only lower what we expect

    assert (USABLE - before) * 0.8 == pytest.approx(cache, abs=max(1.0, 0.0005 * cache))

    waiting = sum(t.bytes for t in ledger.terms if t.term == "load_temporaries") / MIB
    steady = before - waiting + cache + without_estimates(ledger, "buffers")
    assert steady == pytest.approx(held, abs=max(1.0, 0.0005 * held) + 2)

    warmup = next(t for t in ledger.terms if t.term == "pool_warmup")
    assert pool <= warmup.bytes / MIB <= pool + 2  # whole 2 MiB pages


def test_prompts_of_a_short_session_do_not_fill_a_forward():
    """Llama-2-7B, session 4096, prefill 8192, 0.18.0 binary: 254 MiB whatever was queued."""
    account = Case("llama-2-7b").account(session_len=4096)
    (text,) = (t for t in account.transients if t.term == "text_prefill")
    assert 254 <= text.bytes / MIB <= 254 * 1.1


def test_requests_that_meet_in_one_forward_of_the_bound():
    """InternVL2-8B, four queued requests of 13 tiles were seen to bring 39 together, 703 MiB.

    A prefix cache brings pictures back for a few tokens each: 1,873.6 MiB of eight questions.
    """
    changes = {"max_batch_size": 8, "max_prefill_token_num": 4096}
    queued, plain, cached, many = (
        Case("internvl2-8b").account(units=13, **options)
        for options in (
            {}, changes, {**changes, "enable_prefix_caching": True}, {"enable_prefix_caching": True}
        )
    )  # fmt: skip
    assert queued.units_per_forward >= 39
    forwards = [
        next(t.bytes / MIB for t in one.transients if t.term == "vision_forward")
        for one in (queued, cached)
    ]
    assert forwards[0] >= 703
    assert 1873.6 <= forwards[1] <= 1873.6 * 1.01
    assert (plain.units_per_forward, cached.units_per_forward) == (4102 // 256 + 2 * 13, 8 * 13)
    # Beyond a batch's, what the context holds.
    assert many.units_per_forward == 32768 // 256


@pytest.mark.parametrize(("on", "options"), [("1xb200", {}), ("1xh100", {"dtype": "float16"})])
def test_cards_without_a_kernel(on: str, options: dict[str, str]) -> None:
    with pytest.raises(NoKernelError, match="no kernel of gated delta nets"):
        turbofit.plan("qwen3.5-4b", on=on, engine="turbomind", **options)
    if not options:  # torch runs it
        assert turbofit.plan("qwen3.5-4b", on=on).backend.name == "pytorch"
