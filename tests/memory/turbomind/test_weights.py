"""TurboMind's weights, cache and forwards, beside what the 0.18.0 binary held on pretend GPUs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import Case
from turbofit.core.errors import NoKernelError
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.turbomind.cache import block_bytes, cache_shape, tokens_held
from turbofit.memory.turbomind.pool import (
    Forward,
    PoolModel,
    device_buffers,
    meeting_workspace,
    token_bytes,
    workspace,
)
from turbofit.memory.turbomind.weights import (
    expert_width,
    ffn_width,
    load_constants,
    loading_extra,
    packed_elements,
    temporary_bytes,
    weight_classes,
)
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model

CONSTANTS = load_constants()
AWQ = Quantization(method="awq", bits=4, group_size=128)


@pytest.mark.parametrize(
    ("intermediate", "tp", "quantization", "width"),
    [
        (29568, 8, None, 29568),  # Qwen2-VL-72B: held unpadded by 0.18
        (18944, 4, None, 18944),
        (8960, 4, AWQ, 9216),  # whole groups on every rank
        (14336, 1, AWQ, 14336),
    ],
)
def test_mlp_is_padded_to_whole_kernel_blocks(intermediate, tp, quantization, width):
    assert ffn_width(intermediate, tp, quantization, CONSTANTS) == width


@pytest.mark.parametrize(
    ("tp", "capability", "width"),
    [
        (1, (8, 6), 2880), (4, (8, 6), 2944), (8, (8, 9), 3072), (2, (9, 0), 2944),
        (4, (9, 0), 3072),
    ],
)  # fmt: skip
def test_experts_are_padded_to_their_kernels_blocks(tp, capability, width):
    """Of mxfp4 32 channels on every card but Hopper's 64; of 16 bits Hopper takes any."""
    model = resolve_model("gpt-oss-20b")
    packed = (2880, tp, model.quantization, CONSTANTS, capability)
    assert expert_width(*packed) == width
    assert expert_width(2880, 4, None, CONSTANTS, (9, 0)) == 2880
    assert expert_width(2880, 4, None, CONSTANTS, (7, 0)) == 2880
    assert expert_width(2880, 4, None, CONSTANTS, (8, 0)) == 2944
    # 768 channels at tp 4 are 192 a rank on a pretend H100, whole groups of int4 elsewhere.
    assert expert_width(768, 4, AWQ, CONSTANTS, (8, 0)) == 1024
    assert expert_width(768, 4, AWQ, CONSTANTS, (9, 0)) == 768


def test_mxfp4_packs_experts_alone():
    packed, whole = (resolve_model(f"gpt-oss-20b{kind}") for kind in ("", "-bf16"))
    held, full = (weight_classes(model, 1, CONSTANTS) for model in (packed, whole))
    elements = 24 * 32 * 3 * 2880 * 2880
    saved = elements * 2 - elements * 17 // 32
    assert full.pop("mlp") - held.pop("mlp") == pytest.approx(saved, rel=1e-4)
    assert held == full


def test_hopper_repeats_the_scales_of_large_groups():
    """Seen on a pretend H100: groups of 32 and of 128 take the same there, not so on an A100."""
    model = resolve_model("llama-3.1-8b")
    packed = [
        replace(
            model, quantization=Quantization(method="compressed-tensors", bits=4, group_size=size)
        )
        for size in (128, 32)
    ]
    large, small = (weight_classes(one, 1, CONSTANTS, (9, 0)) for one in packed)
    assert large == small
    assert large["mlp"] == model.text.layers * 3 * 4096 * 14336 * (16 + 2.5) / 32
    loading = [loading_extra(one, Settings(tp=1), CONSTANTS, (9, 0)) for one in packed]
    assert loading[0] == loading[1] > 0
    large, small = (weight_classes(one, 1, CONSTANTS) for one in packed)
    assert small["mlp"] > 1.08 * large["mlp"]


@pytest.mark.parametrize(
    ("model", "tp", "policy", "block"),
    [
        ("internvl2-8b", 1, 0, 8388608),
        ("internvl2-8b", 4, 0, 2097152),
        ("internvl2-8b", 4, 8, 1081344),
        ("qwen2-vl-7b", 2, 0, 1835008),
        ("qwen2-vl-7b", 8, 0, 917504),  # 4 KV heads repeated to 8: no smaller than at tp 4
        # A latent is cached once on each rank.
        ("glm-4.7-flash", 1, 0, 47 * 64 * 1152),
        ("glm-4.7-flash", 4, 0, 47 * 64 * 1152),
        ("glm-4.7-flash", 1, 8, 47 * 64 * 580),
    ],
)
def test_block_bytes_as_the_engine_logged_them(model, tp, policy, block):
    settings = Case(model, tp).settings(quant_policy=policy)
    assert block_bytes(resolve_model(model).text, settings) == block


def test_slab_grows_until_it_wastes_little():
    """InternVL2-26B at tp 2: blocks of 6 MiB in slabs of 128 MiB, 21 each, as the engine logged."""
    case = Case("internvl2-26b", 2)
    shape = cache_shape(resolve_model(case.model).text, case.settings(), CONSTANTS)
    assert (shape.block_bytes, shape.slab_bytes) == (6291456, 134217728)
    assert shape.blocks_per_slab == 21
    assert tokens_held(CONSTANTS.page_size, shape, CONSTANTS) == 0
    assert tokens_held(0, shape, CONSTANTS) == 0


@pytest.mark.parametrize(
    ("model", "tp", "changes", "region", "tokens"),
    [
        ("internvl2-8b", 1, {}, 6851.2, 54784),
        ("internvl2-8b", 2, {}, 13011.2, 207872),
        ("internvl2-8b", 4, {"quant_policy": 8}, 16076.8, 995968),
        ("internvl2-26b-awq", 2, {}, 8633.6, 90048),
        ("qwen2-vl-7b", 1, {}, 6329.6, 113472),
        ("qwen2-vl-2b", 1, {}, 7627.2, 274176),
    ],
)
def test_tokens_are_under_by_less_than_a_slab(model, tp, changes, region, tokens):
    """Measured tokens; the address of the first page may cost one, which the forecast charges."""
    shape = cache_shape(resolve_model(model).text, Case(model, tp).settings(**changes), CONSTANTS)
    forecast = tokens_held(int(region * MIB), shape, CONSTANTS)
    slab = shape.blocks_per_slab * shape.block_tokens
    assert tokens - 2 * slab <= forecast <= tokens
    assert forecast % slab == 0


def _settings(tp: int, dtype: str = "bfloat16", batch: int = 384) -> Settings:
    return Settings(
        tp=tp, dtype=dtype, cache_max_entry_count=0.8, max_prefill_token_num=8192,
        max_batch_size=batch, session_len=32768, quant_policy=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tp", "capability", "dtype", "mib"),
    [
        ("mixtral-8x7b", 1, (8, 0), "bfloat16", 448),
        ("mixtral-8x7b", 4, (8, 0), "bfloat16", 112),
        ("mixtral-8x7b", 1, (9, 0), "bfloat16", 224),
        ("mixtral-8x7b", 1, (7, 0), "float16", 448),
        ("qwen3-30b-a3b", 1, (9, 0), "bfloat16", 6),
        ("qwen3-8b", 1, (9, 0), "bfloat16", 0),
    ],
)
def test_an_expert_is_repacked_at_16_bits_too(model, tp, capability, dtype, mib):
    settings = _settings(tp, dtype)
    held = temporary_bytes(preset_model(model), settings, CONSTANTS, capability)
    assert held == mib * MIB


@pytest.mark.parametrize(("stored", "tp", "mib"), [
    ("float32", 1, 2079), ("float32", 2, 1039.5), ("float16", 1, 1039.5), ("bfloat16", 1, 0),
])  # fmt: skip
def test_a_head_that_is_cast_waits_as_it_is_stored(stored, tp, mib):
    """Seen on pretend GPUs: free memory was read with 2,079 MiB less where 32 bits are stored."""
    model = replace(preset_model("qwen2.5-7b"), dtype=stored)
    assert temporary_bytes(model, _settings(tp), CONSTANTS) == mib * MIB


@pytest.mark.parametrize(
    ("model", "held"), [("qwen3-30b-a3b", 5_497_856), ("mixtral-8x7b", 549_888)]
)
def test_routing_is_set_aside_for_a_whole_forward(model, held):
    lines = device_buffers(preset_model(model), _settings(1), CONSTANTS, 40 * MIB)
    routing = {name: size for name, size, _ in lines}["expert_routing"]
    assert 0 <= held - routing < 7 * 512  # seven arrays, each up to its 512 bytes


@pytest.mark.parametrize(
    ("capability", "batch", "seen"), [((8, 0), 384, 540.19), ((9, 0), 1024, 472.50)]
)
def test_experts_hold_the_routers_scores(capability, batch, seen):
    pool = PoolModel(
        preset_model("qwen3-30b-a3b"), _settings(1, batch=batch), CONSTANTS, capability
    )
    tokens = 8192 + batch
    assert 0 <= pool.peak(Forward(tokens=tokens, context=tokens)) / MIB - seen < 0.1


@pytest.mark.parametrize(("tp", "seen"), [(1, 531.10), (2, 410.63)])
def test_a_shared_expert_has_an_output_beside_the_others(tp, seen):
    """Four layers of a Qwen2-MoE with 32 experts of 256 channels, warmed up on pretend GPUs."""
    model = preset_model("qwen3-30b-a3b")
    moe = replace(model.text.moe, layers=4, experts=32, intermediate=256, shared_intermediate=5632)
    text = replace(model.text, layers=4, head_dim=64, moe=moe)
    pool = PoolModel(replace(model, text=text), _settings(tp, batch=32), CONSTANTS)
    warm_up = Forward(tokens=8224, context=8224, first_layer=True)
    assert 0 <= pool.peak(warm_up) / MIB - seen < 0.1


@pytest.mark.parametrize(
    ("name", "tp", "batch", "seen"),
    [
        ("qwen2.5-7b", 1, 32, 294.65), ("llama-3.1-8b", 1, 32, 322.25),
        ("llama-3.1-8b", 2, 64, 161.75), ("qwen3-32b", 1, 64, 518.02),
    ],
)  # fmt: skip
def test_fp8_products_on_hopper_are_fused_and_quantised(name, tp, batch, seen):
    """A warm-up on pretend H100s, in MiB."""
    packed = Quantization(method="fp8", bits=8, group_size=128)
    model = replace(preset_model(name), quantization=packed)
    pool = PoolModel(model, _settings(tp, batch=batch), CONSTANTS, (9, 0))
    tokens = 8192 + batch
    assert 0 <= pool.peak(Forward(tokens=tokens, context=tokens)) / MIB - seen < 0.1


MODEL = resolve_model("glm-4.7-flash")


@pytest.mark.parametrize(("tp", "mib"), [(1, 58_318), (2, 29_288)])
def test_weights_are_the_engines_in_whole_pages(tp: int, mib: int) -> None:
    held = sum(weight_classes(MODEL, tp, CONSTANTS).values()) / MIB
    assert mib - 2 < held <= mib


@pytest.mark.parametrize(
    ("batch", "tp", "capability", "warm_up", "prompt"),
    [
        (384, 1, (8, 0), 462.79, 481.63), (384, 2, (8, 0), 240.85, 270.09),
        (1024, 1, (9, 0), 497.32, None),
    ],
)  # fmt: skip
def test_forwards_hold_what_the_engine_held(
    batch: int, tp: int, capability: tuple[int, int], warm_up: float, prompt: float | None
) -> None:
    """A warm-up runs the first layer alone, which has no experts."""
    settings = Settings(max_batch_size=batch, session_len=32768, tp=tp)
    pool = PoolModel(MODEL, settings, CONSTANTS, capability)
    tokens = settings.max_prefill_token_num + batch
    found = pool.peak(Forward(tokens=tokens, context=tokens, first_layer=True)) / MIB
    assert warm_up <= found < warm_up + 0.1
    if prompt is not None:
        found = pool.peak(Forward(tokens=tokens, context=32704)) / MIB
        assert prompt <= found < prompt * 1.03


SETTINGS = Settings(tp=1, max_batch_size=128, session_len=32768)


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


def test_a_large_batch_leaves_one_request_its_context() -> None:
    """States of 128 sequences are more than this cache; the engine then runs fewer at once."""
    few, many = (
        turbofit.predict(
            "qwen3.5-9b", on="1xrtx3090", engine="turbomind", tp=1, max_batch_size=batch,
            session_len=8192, max_prefill_token_num=2048, cache_max_entry_count=0.5,
        )
        for batch in (8, 128)
    )  # fmt: skip
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
    settings = replace(SETTINGS, tp=4, max_batch_size=batch)
    assert seen <= meeting_workspace(small.text.delta, settings, kernel, 132, tokens) < 1.3 * seen


def test_a_tokens_projections(small: Model) -> None:
    """A prompt of 8,000 tokens took 478,208,512 bytes with its two streams of 2,560 channels."""
    seen = 478_208_512 - 8000 * 2 * 2560 * 2
    assert 0 <= seen - token_bytes(small.text.delta, 1) * 8000 < 1024


@pytest.mark.parametrize(("on", "options"), [("1xb200", {}), ("1xh100", {"dtype": "float16"})])
def test_cards_without_a_kernel(on: str, options: dict[str, str]) -> None:
    with pytest.raises(NoKernelError, match="no kernel of gated delta nets"):
        turbofit.plan("qwen3.5-4b", on=on, engine="turbomind", **options)
    if not options:  # torch runs it
        assert turbofit.plan("qwen3.5-4b", on=on).engine.name == "pytorch"
