"""Gated delta nets on TurboMind, by what LMDeploy 0.18 took on pretend GPUs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import NoKernelError
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Plan, Settings
from turbofit.core.units import MIB
from turbofit.memory.turbomind.cache import cache_shape, tokens_held
from turbofit.memory.turbomind.pool import meeting_workspace, token_bytes, workspace
from turbofit.memory.turbomind.weights import load_constants, packed_elements, weight_classes
from turbofit.model.source import resolve_model

CONSTANTS = load_constants()
SETTINGS = Settings(tp=1, max_batch_size=128, session_len=32768)
FP8 = Quantization(method="fp8", bits=8, group_size=128)


@pytest.fixture
def small() -> Model:
    return resolve_model("qwen3.5-4b")


def test_weights_are_the_checkpoints_and_the_tied_head_again(small: Model) -> None:
    head = small.text.vocab * small.text.hidden
    held = sum(weight_classes(small, 1, CONSTANTS).values()) - (small.parameters + head) * 2
    assert 0 <= held < 64 << 10  # the driver rounds up what is small


def test_ranks_share_heads(small: Model) -> None:
    one, four = (weight_classes(small, tp, CONSTANTS)["delta"] for tp in (1, 4))
    # On every rank is a norm, and what decays and biases are rounded up by.
    whole = small.text.delta.layers * 3 * 512
    assert (four - whole) * 4 == one - whole


@pytest.mark.parametrize(
    ("method", "qkv"),
    [("fp8", 2.0), ("awq", 0.53125)],  # fp8's blocks do not turn with heads of 256
)
def test_what_is_joined_with_gates_is_widened(small: Model, method: str, qkv: float) -> None:
    bits = 8 if method == "fp8" else 4
    packing = Quantization(method=method, bits=bits, group_size=128)
    packed = replace(small, quantization=packing)
    text, delta = small.text, small.text.delta
    held = 0.53125 if method == "awq" else 1 + 2 / 128
    rows = (2 * text.heads + 2 * text.kv_heads) * text.head_dim
    attention = text.hidden * rows * qkv + text.hidden * text.heads * text.head_dim * held
    classes = weight_classes(packed, 1, CONSTANTS)
    assert classes["attention"] == int(attention * text.attention_layers)
    out = delta.layers * delta.values * text.hidden
    plain = weight_classes(small, 1, CONSTANTS)["delta"]
    assert classes["delta"] == plain - int(out * (2 - held))
    mlp = weight_classes(small, 1, CONSTANTS)["mlp"] // 2
    attended = text.attention_layers * text.hidden * text.heads * text.head_dim
    attended += text.attention_layers * text.hidden * rows if method == "awq" else 0
    assert packed_elements(packed, 1, CONSTANTS) == mlp + attended + out


def test_a_running_sequence_has_a_state_in_the_cache(small: Model) -> None:
    """A MiB of state for each of 24 layers, and 1.5 MiB of the convolutions' inputs."""
    shape = cache_shape(small.text, SETTINGS, CONSTANTS)
    assert shape.state_bytes == 25.5 * MIB
    assert shape.block_bytes == 2 * MIB
    assert [part.per_slab for part in shape.states] == [21, 32]
    region = 225 * 32 * MIB  # one page is lost to alignment
    assert tokens_held(region, shape, CONSTANTS, 1) == (224 - 2) * 16 * 64
    # 7 slabs of 21 objects, and 96 of 32
    assert tokens_held(region, shape, CONSTANTS, 128) == (224 - 7 - 96) * 16 * 64


def predicted(on: str, batch: int) -> Plan:
    return turbofit.predict(
        "qwen3.5-9b", on=on, engine="turbomind", tp=1, max_batch_size=batch, session_len=8192,
        max_prefill_token_num=2048, cache_max_entry_count=0.5,
    )  # fmt: skip


def test_a_large_batch_leaves_one_request_its_context() -> None:
    """States of 128 sequences are more than this cache; the engine then runs fewer at once."""
    few, many = (predicted("1xrtx3090", batch) for batch in (8, 128))
    assert few.verdict == many.verdict
    assert few.kv.tokens > many.kv.tokens
    assert many.kv.longest_request_tokens == 8192


@pytest.mark.parametrize(
    ("tp", "capability", "tokens", "seen"),
    [
        (1, (9, 0), 8320, 72_895_488),
        (4, (9, 0), 8448, 26_749_952),
        (1, (9, 0), 64, 4_231_168 // 8),
        (1, (8, 6), 8320, 0),
    ],
)
def test_the_warm_up_took_as_much(
    small: Model, tp: int, capability: tuple[int, int], tokens: int, seen: int
) -> None:
    kernel = CONSTANTS.delta_kernel(capability)
    assert kernel is not None
    assert small.text.delta is not None
    found = workspace(small.text.delta, replace(SETTINGS, tp=tp), kernel, 132, tokens)
    assert found >= seen
    if tokens > 64:
        assert found - seen <= 32 << 10


@pytest.mark.parametrize(
    ("batch", "tokens", "seen"), [(101, 1928, 111_570_432), (128, 6654, 154_438_656)]
)
def test_prompts_that_meet_take_no_more_than_the_most(
    small: Model, batch: int, tokens: int, seen: int
) -> None:
    """One long prompt among many of two tokens, on four H100s."""
    kernel = CONSTANTS.delta_kernel((9, 0))
    assert kernel is not None
    assert small.text.delta is not None
    settings = replace(SETTINGS, tp=4, max_batch_size=batch)
    assert seen <= meeting_workspace(small.text.delta, settings, kernel, 132, tokens) < 1.3 * seen


def test_a_tokens_projections(small: Model) -> None:
    """A prompt of 8,000 tokens took 478,208,512 bytes with its two streams of 2,560 channels."""
    assert small.text.delta is not None
    seen = 478_208_512 - 8000 * 2 * 2560 * 2
    assert 0 <= seen - token_bytes(small.text.delta, 1) * 8000 < 1024


@pytest.mark.parametrize(("on", "options"), [("1xb200", {}), ("1xh100", {"dtype": "float16"})])
def test_cards_without_a_kernel(on: str, options: dict[str, str]) -> None:
    with pytest.raises(NoKernelError, match="no kernel of gated delta nets"):
        turbofit.plan("qwen3.5-4b", on=on, engine="turbomind", **options)


def test_torch_runs_it_where_turbomind_cannot() -> None:
    assert turbofit.plan("qwen3.5-4b", on="1xb200").engine.name == "pytorch"
