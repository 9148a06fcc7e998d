"""What Llama 4 takes beyond other models with experts, in the PyTorch engine's account."""

from __future__ import annotations

import pytest

from tests.memory.pytorch.test_account import CONSTANTS, account
from turbofit.core.plan import Settings
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.cache import block_bytes
from turbofit.memory.pytorch.weights import largest_loaded, weight_classes
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(("name", "experts"), [("llama-4-scout", 16), ("llama-4-maverick", 128)])
def test_a_layer_s_experts_go_to_every_card_as_one(name: str, experts: int) -> None:
    model = resolve_model(name)
    fused = experts * 5120 * 2 * 8192 * 2
    assert largest_loaded(model, 8) == fused
    # One card alone would lay all of them out anew, down as well.
    assert largest_loaded(model, 1) == fused * 3 // 2
    assert sum(weight_classes(model, 1).values()) == 2 * model.parameters


def test_the_load_is_what_stops_a_maverick() -> None:
    one = account("llama-4-maverick", on="8xh200", tp=8)
    held = sum(t.bytes for t in one.at(0.1).ledgers[1].ledger if t.phase == "weights")
    assert one.at(0.1).ledgers[1].load_peak > held + 128 * 5120 * 2 * 8192 * 2


def test_every_layer_caches_the_whole_context() -> None:
    # LMDeploy cuts no layer's attention into chunks of 8192 tokens.
    text = resolve_model("llama-4-scout").text
    assert block_bytes(text, Settings()) == 2 * 48 * 8 * 64 * 128 * 2


@pytest.mark.parametrize("tp", [1, 8])
def test_experts_and_rotation_are_paid_for(tp: int) -> None:
    model = resolve_model("llama-4-scout")
    work = Activations(model, Settings(tp=tp), CONSTANTS)
    short = work.prefill(Prefill(tokens=8192, context=8192))
    # Routed and shared gate and up, the weighed inputs and both outputs, at 16 bits.
    assert short > 8192 * 2 * (2 * 2 * 8192 // tp + 3 * 5120)
    long = work.prefill(Prefill(tokens=8192, context=10_000_000))
    heads, kv = 5120 // tp, 1024 // tp
    flat = 2 * kv * 10_000_000
    assert long > 2 * (8192 * (5 * heads + 5 * kv + 5 * 5120) + flat)
