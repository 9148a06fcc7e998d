"""The replayed order of allocations against the account, which only sums them up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbofit.core.plan import Settings
from turbofit.core.units import MIB, round_up
from turbofit.diagnose.rules.padding import temporaries, weights_held
from turbofit.diagnose.rules.replay import PoolOperation, Replay
from turbofit.diagnose.rules.sequence import EXECUTOR, WEIGHTS, forward_ops, rank_buffers, start_ops
from turbofit.memory.turbomind.pool import Forward, PoolModel, device_buffers
from turbofit.memory.turbomind.weights import load_constants
from turbofit.model.presets import preset_model

STEP = 2 * MIB
CONSTANTS = load_constants()
#: Seen in the 0.18.0 binary on pretend GPUs: bytes alive in the weights' pool of a rank.
WEIGHTS_SEEN = {
    ("internvl2-1b", 1): 1_876_337_664, ("internvl2-1b", 2): 940_092_928,
    ("internvl2-8b", 2): 8_077_522_944, ("internvl2-8b-awq", 2): 2_952_083_456,
    ("internvl2-40b-awq", 2): 17_339_329_536, ("internvl3-8b", 2): 7_946_461_696,
    ("qwen2-vl-2b", 1): 5_136_524_288, ("qwen2-vl-2b", 2): 2_570_104_832,
    ("qwen2.5-vl-7b", 1): 16_837_143_040, ("qwen2.5-vl-7b", 2): 8_420_449_792,
    ("qwen3-8b", 2): 8_191_062_016,
}  # fmt: skip
#: Likewise: the rank's pool after the cache, by (model, tp, batch, prefill, session).
BUFFERS_SEEN = {
    ("internvl2-8b", 1, 128, 8192, 32768): 91_418_624,
    ("internvl2-8b", 2, 128, 8192, 32768): 57_339_904,
    ("internvl2-1b", 1, 5, 8192, 32768): 16_316_928,
    ("internvl2-1b", 1, 300, 2048, 32768): 73_741_824,
    ("qwen2-vl-7b", 1, 128, 8192, 32768): 84_920_832,
    ("qwen2-vl-7b", 2, 128, 8192, 32768): 55_101_952,
    ("qwen2-vl-2b", 1, 300, 2048, 5000): 48_824_832,
}


@pytest.mark.parametrize(("key", "seen"), WEIGHTS_SEEN.items(), ids=str)
def test_weights_to_the_byte(key: tuple[str, int], seen: int) -> None:
    assert weights_held(preset_model(key[0]), key[1], CONSTANTS) == seen


@pytest.mark.parametrize(("key", "seen"), BUFFERS_SEEN.items(), ids=str)
def test_buffers_to_the_byte(key: tuple[str, int, int, int, int], seen: int) -> None:
    name, tp, batch, prefill, session = key
    model = preset_model(name)
    settings = Settings(
        tp=tp, max_batch_size=batch, max_prefill_token_num=prefill, session_len=session
    )
    pool = PoolModel(model, settings, CONSTANTS)
    ops = list(rank_buffers(model, settings, pool, CONSTANTS))
    assert sum(op.size for op in ops if op.pool) == seen
    # The account's sum of the same buffers differs by what 512-byte rounding takes.
    alone = ("symmetric_buffer", "gemm_workspace", "l2_flush")
    lines = device_buffers(model, settings, CONSTANTS, 0)
    summed = sum(size for term, size, _ in lines if term not in alone)
    assert abs(summed - seen) < MIB // 8


@pytest.mark.parametrize("name", ["internvl2-8b", "internvl2-26b-awq", "qwen2-vl-7b", "qwen3-8b"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_order_has_the_accounts_peak(name: str, tp: int) -> None:
    model = preset_model(name)
    pool = PoolModel(model, Settings(tp=tp), CONSTANTS)
    for tokens, units in ((8320, 0), (300, 0), (4000, 12), (8320, 128), (17, 40_000)):
        images = 0 if model.vision is None else units
        forward = Forward(tokens=tokens, context=tokens, units=images)
        live = peak = 0
        for op in forward_ops(pool, forward):
            live += op.size if op.pool == EXECUTOR else 0
            peak = max(peak, live)
        assert live == 0
        # Sampling is not replayed; single rows of it never decide. Small tensors of a step are.
        assert peak == pytest.approx(pool.peak(forward), abs=MIB)


def test_a_start_that_fits_leaves_room_and_one_that_does_not_says_where() -> None:
    model = preset_model("internvl2-8b")
    settings = Settings(tp=1, max_batch_size=128)
    pool = PoolModel(model, settings, CONSTANTS)
    region = 8_126_904_320
    weights = weights_held(model, 1, CONSTANTS)

    def start(free: int) -> tuple[Replay, object]:
        replay = Replay(free, STEP, {WEIGHTS: weights})
        for op in start_ops(model, settings, pool, CONSTANTS, region):
            fault = replay.trim(op.pool) if op.what == "trim" else replay.do(op)
            if fault:
                return replay, fault
        return replay, None

    replay, fault = start(8_980_004_864)
    assert fault is None
    assert replay.room(EXECUTOR) == 690 * MIB
    _, fault = start(region + 32 * MIB)
    assert fault is not None
    assert fault.what == "attention workspace"
    assert fault.short > 0


def test_what_weight_preparation_still_holds() -> None:
    awq = preset_model("internvl2-8b-awq")
    assert temporaries(awq, Settings(dtype="float16"), CONSTANTS) == 224 * MIB
    plain = preset_model("internvl2-8b")
    assert temporaries(plain, Settings(), CONSTANTS) == 0
    cast = temporaries(plain, Settings(dtype="float16"), CONSTANTS)
    assert cast == pytest.approx(723 * MIB, abs=MIB)


@given(st.lists(st.integers(1, 10 * MIB), max_size=30), st.integers(0, 100 * MIB))
def test_a_pool_never_holds_more_than_the_card_has(sizes: list[int], free: int) -> None:
    replay = Replay(free, STEP)
    done = 0
    for size in sizes:
        fault = replay.do(PoolOperation("pool", size, "x"))
        if fault is not None:
            assert fault.short == round_up(done + size, STEP) - round_up(done, STEP) - replay.left
            assert fault.short > 0
            break
        done += size
    assert replay.left >= 0
    assert replay.room("pool") == free
    replay.do(PoolOperation("pool", -done, "x"))
    replay.trim("pool")
    assert replay.left == free


@given(st.integers(1, 50 * MIB), st.integers(0, 50 * MIB))
def test_an_allocation_by_itself(size: int, free: int) -> None:
    replay = Replay(free, STEP)
    fault = replay.do(PoolOperation("", size, "x"))
    if fault is None:
        assert replay.left == free - round_up(size, STEP)
    else:
        assert (fault.short, replay.left) == (round_up(size, STEP) - free, free)
