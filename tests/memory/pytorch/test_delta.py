"""Gated delta nets in the PyTorch engine's account: states, and what a forward of them holds.

State and block sizes are held against LMDeploy's own in ``tests/model/test_oracle_qwen3_5.py``.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS, account
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import PytorchAccount
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.cache import block_bytes, state_bytes
from turbofit.memory.pytorch.weights import largest_loaded, weight_classes
from turbofit.memory.start_outcome import outcome_at
from turbofit.model.source import resolve_model

SIZES = ["qwen3.5-4b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b"]
#: Of the 27B: 48 layers of 10,240 channels and 48 heads of 128 x 128.
WINDOW, STATE = 48 * 10_240 * 4 * 2, 48 * 48 * 128 * 128 * 2


def ledger(one: PytorchAccount, ratio: float = 0.5) -> dict[str, int]:
    return {term.term: term.bytes for term in one.at(ratio).ledgers[0].ledger}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_slot_for_each_sequence_and_two(tp: int) -> None:
    text = resolve_model("qwen3.5-27b").text
    settings = Settings(tp=tp, max_batch_size=8)
    assert state_bytes(text, settings) == 10 * (WINDOW + STATE) // tp
    assert state_bytes(text, replace(settings, session_len=10, quant_policy=8)) == (
        10 * (WINDOW + STATE) // tp
    )


def test_only_attention_has_keys_and_values() -> None:
    text = resolve_model("qwen3.5-27b").text
    assert block_bytes(text, Settings()) == 2 * 16 * 4 * 64 * 256 * 2
    assert state_bytes(resolve_model("qwen3-vl-8b").text, Settings()) == 0


def test_states_come_off_what_is_free_before_the_ratio() -> None:
    free = 20_000 * MIB
    one = account("qwen3.5-27b", on="1xh100", free=free, max_batch_size=8)
    runtime = (8192 + 2 * 8) * 248_320 * 2
    assert one.ratio_base == free - 10 * (WINDOW + STATE) - runtime
    blocks = int(one.ratio_base * 0.8) // one.block_bytes
    assert one.region_at(0.8) == blocks * one.block_bytes
    found = ledger(one)
    assert 0 <= found["state_cache"] - 10 * (WINDOW + STATE) < CONSTANTS.page
    assert list(found).index("state_cache") == list(found).index("kv_cache") + 1
    assert "state_cache" not in ledger(account("qwen2-vl-7b"))


def test_more_sequences_leave_less_for_keys() -> None:
    few, many = (account("qwen3.5-27b", on="1xh100", max_batch_size=n) for n in (8, 64))
    assert many.ratio_base < few.ratio_base - 56 * (WINDOW + STATE)
    assert ledger(many)["state_cache"] > 6 * ledger(few)["state_cache"]
    # Short prompts of all of them can meet in one forward, each with its state.
    first, second = (max(t.bytes for t in one.transients if t.term == "text_prefill")
                     for one in (few, many))  # fmt: skip
    assert second - first >= 56 * 48 * 128 * 128 * 8
    assert account("qwen3.5-27b", on="1xh100", max_batch_size=512).best_ratio() is None


def test_a_state_cache_that_does_not_fit_is_told_before_the_start() -> None:
    fate = outcome_at(account("qwen3.5-27b", on="1xh100", max_batch_size=512), 0.8)
    assert (fate.kind, "state_cache 38.0 GiB" in fate.text) == ("buffers", True), fate.text


@pytest.mark.parametrize("name", SIZES)
def test_ranks_share_all_but_the_norms(name: str) -> None:
    model = resolve_model(name)
    delta = model.text.delta
    assert delta is not None
    whole, half = (weight_classes(model, tp)["delta"] for tp in (1, 2))
    norms = delta.layers * delta.value_dim * 2
    assert half - norms == (whole - norms) // 2
    # At 16 bits, but for what is at 32: two biases, and the decay that is kept besides.
    total = sum(weight_classes(model, 1).values())
    assert total == 2 * model.parameters + delta.layers * delta.value_heads * (2 * 2 + 4)
    down = model.text.hidden * max(model.text.intermediate, delta.values) * 2
    moe = model.text.moe
    if moe is None:
        assert largest_loaded(model, 2) - largest_loaded(model, 1) == down
    else:
        experts = moe.experts * 3 * model.text.hidden * moe.intermediate * 2
        assert [largest_loaded(model, tp) for tp in (1, 2)] == [experts, experts // 2]


@pytest.mark.parametrize("name", SIZES)
def test_a_delta_net_holds_more_than_its_tensors(name: str) -> None:
    """No less than what fla's own chunked forward returns and keeps, in a layer of its own."""
    model = resolve_model(name)
    delta = model.text.delta
    assert delta is not None
    tokens, sequences = 8192, 4
    work = Activations(model, Settings(max_batch_size=sequences), CONSTANTS)
    found = work.prefill(Prefill(tokens=tokens, context=tokens, sequences=sequences))
    heads = delta.value_heads
    state = heads * delta.key_dim * delta.value_dim
    projected = tokens * (2 * delta.channels + delta.values)
    rule = tokens * (3 * heads * delta.key_dim + 4 * delta.values + 64 * heads)
    chunks = (tokens // 64 + sequences) * state
    left = sequences * state * 2 * 2
    assert found > 2 * (projected + rule + chunks) + left + CONSTANTS.kernel_tuning
