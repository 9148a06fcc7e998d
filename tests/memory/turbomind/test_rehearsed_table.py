"""The formula against what the 0.18.0 binary allocated on pretend GPUs (bf16, batch 128, F = 8320).

Each row is one run of LMDeploy's own `_turbomind` on a card of 24268 MiB, 300 of them used by
others, at ratio 0.8. That run has no CUDA context, no NCCL and no driver rounding, so the account's
`estimate` terms are left out of the comparison. The pools of those pretend GPUs grew by 2 MiB, and
so do the account's here: its sums are the engine's to a page. All figures in MiB per rank.
"""

from __future__ import annotations

from functools import partial

import pytest

from tests.memory.conftest import Case as AnyCase
from turbofit.core.plan import GpuLedger
from turbofit.core.units import MIB
from turbofit.memory.turbomind.pool import Forward, PoolModel
from turbofit.model.source import resolve_model

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
    terms = (t for t in ledger.ledger if t.phase in phases and t.basis != "estimate")
    return sum(term.bytes for term in terms) / MIB


@pytest.mark.parametrize(
    ("model", "tp", "changes", "weights", "free", "cache", "held", "pool"), STARTS, ids=IDS
)
def test_start_as_the_engine_allocated_it(model, tp, changes, weights, free, cache, held, pool):
    account = Case(model, tp).account(**changes)
    ledger = account.at(0.8).ledgers[-1]  # the last rank: no staging, fewer handles
    classes = [
        t for t in ledger.ledger if t.term.startswith("weights.") and "rounding" not in t.term
    ]
    assert sum(t.bytes for t in classes) / MIB == pytest.approx(weights, abs=0.3)

    before = without_estimates(ledger, "context", "weights")
    assert USABLE - before == pytest.approx(free, abs=max(1.0, 0.0005 * before))
    assert account.at(0.8).free <= free * MIB  # estimates only lower what we expect

    forecast = (USABLE - before) * 0.8
    assert forecast == pytest.approx(cache, abs=max(1.0, 0.0005 * cache))

    waiting = sum(t.bytes for t in ledger.ledger if t.term == "load_temporaries") / MIB
    steady = before - waiting + cache + without_estimates(ledger, "buffers")
    assert steady == pytest.approx(held, abs=max(1.0, 0.0005 * held) + 2)

    warmup = next(t for t in ledger.ledger if t.term == "pool_warmup")
    assert pool <= warmup.bytes / MIB <= pool + 2  # whole 2 MiB pages


# model, tp, changed settings, units in one request, live pool peak
TILES = [
    *[("internvl2-8b", 1, {}, t, p) for t, p in
      ((1, 22.25), (6, 122.25), (13, 262.25), (26, 522.25), (40, 720.63), (80, 1441.25))],
    *[("internvl2-8b", 4, {}, t, p) for t, p in
      ((1, 8.5), (6, 51.0), (13, 110.5), (26, 221.1), (40, 288.1), (100, 408.0))],
    *[("internvl2-26b", 4, {}, t, p) for t, p in
      ((1, 46.8), (6, 280.8), (13, 608.3), (26, 734.9), (40, 776.9))],
    *[("internvl2-8b", 1, {"max_prefill_token_num": 2048}, t, p) for t, p in
      ((13, 234.2), (40, 720.63))],
]  # fmt: skip
PATCHES = [
    *[(1, h * w, p) for h, w, p in
      ((78, 138, 306.48), (100, 100, 284.73), (150, 200, 854.0),
       (200, 200, 1138.92), (256, 256, 1866.0))],
    *[(4, h * w, p) for h, w, p in ((78, 138, 90.99), (150, 200, 326.84), (256, 256, 714.0))],
]  # fmt: skip


def pool_of(model: str, tp: int = 1, **changes: object) -> PoolModel:
    case = Case(model, tp)
    return PoolModel(resolve_model(model), case.settings(**changes), case.account().constants)


@pytest.mark.parametrize(
    ("model", "tp", "changes", "units", "peak"),
    [*TILES, *(("qwen2-vl-7b", tp, {}, patches, peak) for tp, patches, peak in PATCHES)],
)
def test_pool_peak_by_units(model, tp, changes, units, peak):
    pool = pool_of(model, tp, **changes)
    prompt = resolve_model(model).image_rule.unit_tokens(units) + 32
    forward = Forward(tokens=min(pool.forward_tokens, prompt), context=prompt, units=units)
    forecast = pool.peak(forward) / MIB
    assert peak - 0.06 <= forecast <= peak * 1.03  # published to 0.1 MiB; never under beyond that


def test_three_requests_meet_in_one_forward_of_the_bound():
    """Four queued 13-tile requests were seen to bring 39 tiles together, 703 MiB."""
    account = Case("internvl2-8b").account(units=13)
    assert account.units_per_forward >= 39
    worst = next(t for t in account.transients if t.term == "vision_forward")
    assert worst.bytes / MIB >= 703


# Where rows sample, hidden states of the forward are gone: 127 of them beside a prompt of 8,065.
@pytest.mark.parametrize(
    ("model", "tp", "changes", "tokens", "rows", "peak"),
    [
        ("internvl2-8b", 4, {"max_batch_size": 1024, "max_prefill_token_num": 1024,
                             "session_len": 4096}, 2048, 1024, 1816.14),
        ("qwen2.5-0.5b", 1, {}, 8192, 128, 371.16),
    ],
)  # fmt: skip
def test_a_full_batch_sampling_with_top_k_0(model, tp, changes, tokens, rows, peak):
    forward = Forward(tokens=tokens, context=tokens, rows=rows, top_k_0=True)
    assert peak <= pool_of(model, tp, **changes).peak(forward) / MIB <= peak * 1.01


def test_prompts_of_a_short_session_do_not_fill_a_forward():
    """Llama-2-7B, session 4096, prefill 8192, 0.18.0 binary: 254 MiB whatever was queued."""
    account = Case("llama-2-7b").account(session_len=4096)
    (text,) = (t for t in account.transients if t.term == "text_prefill")
    assert 254 <= text.bytes / MIB <= 254 * 1.1


def test_a_prefix_cache_brings_pictures_back_for_a_few_tokens_each():
    """InternVL2-8B, eight questions about a cached picture of 13 tiles: 1,873.6 MiB were seen."""
    changes = {"max_batch_size": 8, "max_prefill_token_num": 4096}
    plain = Case("internvl2-8b").account(units=13, **changes)
    cached = Case("internvl2-8b").account(units=13, enable_prefix_caching=True, **changes)
    assert plain.units_per_forward == 4102 // 256 + 2 * 13
    assert cached.units_per_forward == 8 * 13
    (worst,) = (t for t in cached.transients if t.term == "vision_forward")
    assert 1873.6 <= worst.bytes / MIB <= 1873.6 * 1.01
    # Beyond a batch's, what the context holds.
    many = Case("internvl2-8b").account(units=13, enable_prefix_caching=True)
    assert many.units_per_forward == 32768 // 256
