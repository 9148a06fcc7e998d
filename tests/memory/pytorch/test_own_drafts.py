"""Drafts that are layers of the model's own checkpoint: on every rank, and dear in states."""

from __future__ import annotations

import pytest
from msgspec import UNSET
from msgspec.structs import replace

import turbofit
from tests.sweep import sweep
from turbofit.core.errors import NoKernelError, UsageError
from turbofit.core.model import Draft, Model
from turbofit.core.plan import Plan, Settings
from turbofit.core.units import GIB, MIB
from turbofit.memory.pytorch.activations import Activations, Prefill, latent_parts
from turbofit.memory.pytorch.cache import draft_block, state_bytes
from turbofit.memory.pytorch.weights import load_constants, own_draft_weights
from turbofit.model.drafts import with_draft
from turbofit.model.source import resolve_model

QWEN, GLM = "qwen3_5_mtp", "deepseek_mtp"


def drafted(name: str, tokens: int = 1) -> tuple[Model, Draft]:
    model = resolve_model(name)
    algorithm = QWEN if name.startswith("qwen") else GLM
    model = with_draft(model, algorithm, None, tokens)
    assert model.draft is not UNSET
    return model, model.draft


@pytest.mark.parametrize(
    ("name", "sizes"),
    # MiB of a slot with 0, 1 and 3 tokens, and GiB of 258 slots, by hand: 27B has 48 delta nets of
    # 48 value heads with 128 x 128 numbers, and convolutions over 10,240 channels.
    [
        ("qwen3.5-27b", ((75.75, 19.1), (148.7, 37.5), (294.6, 74.2))),
        ("qwen3.6-27b", ((75.75, 19.1), (148.7, 37.5), (294.6, 74.2))),
        ("qwen3.5-35b-a3b", ((31.9, 8.0), (62.3, 15.7), (123.3, 31.1))),
        ("qwen3.5-9b", ((25.5, 6.4), (49.9, 12.6), (98.6, 24.8))),
    ],
)
def test_states_grow_with_each_token(name: str, sizes: tuple[tuple[float, float], ...]) -> None:
    text = resolve_model(name).text
    for tokens, (slot, all_slots) in zip((0, 1, 3), sizes, strict=True):
        size = state_bytes(text, Settings(max_batch_size=256), tokens)
        assert size / 258 / MIB == pytest.approx(slot, abs=0.06)
        assert size / GIB == pytest.approx(all_slots, abs=0.06)


#: Channels of Qwen3.5-27B: hidden, queries (24 heads of 256), keys, MLP; of GLM-4.5-Air as well.
_QWEN_LAYER = 5120 * (2 * 6144 + 2 * 1024) + 6144 * 5120 + 3 * 5120 * 17408
_GLM_EXPERTS = 128 * 3 * 4096 * 1408 + 3 * 4096 * 1408


@pytest.mark.parametrize(
    ("name", "tp", "divided", "whole"),
    # by hand: numbers of 16 bits that ranks divide, and that each rank has whole
    [
        ("qwen3.5-27b", 1, _QWEN_LAYER, 2 * 5120**2),
        ("qwen3.5-27b", 4, _QWEN_LAYER, 2 * 5120**2),
        ("qwen3.5-27b-awq", 2, _QWEN_LAYER, 2 * 5120**2),
        (
            "qwen3.5-35b-a3b",
            2,
            2048 * (2 * 4096 + 2 * 512) + 4096 * 2048 + 257 * 3 * 2048 * 512,
            2 * 2048**2 + 256 * 2048,
        ),
        (
            "glm-4.5-air",
            4,
            4096 * (2 * 12288 + 2 * 1024) + _GLM_EXPERTS + 151552 * 4096,
            151552 * 4096 + 2 * 4096**2 + 2 * 128 * 4096,  # a router of 32 bits
        ),
        # latents: queries of 20 heads with 256 channels, values of 256, and copies of kv_b
        (
            "glm-4.7-flash",
            4,
            768 * 5120 + 2 * 512 * 20 * 448 + 5120 * 2048 + 65 * 3 * 2048 * 1536 + 154880 * 2048,
            2048 * (768 + 576) + 154880 * 2048 + 2 * 2048**2 + 64 * 2048,
        ),
    ],
)
def test_weights_by_hand(name: str, tp: int, divided: int, whole: int) -> None:
    model, draft = drafted(name)
    size = own_draft_weights(model, draft, tp)
    small = 8 * MIB // 100  # norms and biases
    assert 0 <= size - 2 * (divided // tp + whole) <= small


def test_fp8_layers_are_packed_and_what_joins_is_not() -> None:
    model, draft = drafted("qwen3.5-27b")
    packed, packed_draft = drafted("qwen3.5-27b-fp8")
    whole, half = own_draft_weights(model, draft, 1), own_draft_weights(packed, packed_draft, 1)
    scales = 4 * _QWEN_LAYER // 128**2
    assert whole - half == pytest.approx(_QWEN_LAYER - scales, rel=1e-4)
    assert packed.quantization is not None
    for names, size in {("mtp.fc", "visual"): half, ("mtp", "visual"): whole}.items():
        told = replace(packed, quantization=replace(packed.quantization, unconverted=names))
        assert own_draft_weights(told, packed_draft, 1) == size


@pytest.mark.parametrize(
    ("name", "tp", "size"),
    # keys and values; of latents there are keys alone, whole on every rank
    [
        ("qwen3.5-27b", 1, 2 * 4 * 256),
        ("qwen3.5-27b", 4, 2 * 256),
        ("glm-4.5-air", 2, 2 * 4 * 128),
        ("glm-4.7-flash", 4, 576),
        ("deepseek-v3", 8, 576),
    ],
)
def test_blocks_are_divided_as_the_models(name: str, tp: int, size: int) -> None:
    settings = Settings(tp=tp, speculative_algorithm=GLM)
    assert draft_block(drafted(name)[0], settings) == 64 * size * 2


def planned(name: str, on: str, **options: object) -> Plan:
    algorithm = QWEN if name.startswith("qwen") else GLM
    return turbofit.plan(name, on=on, speculative_algorithm=algorithm, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "on", "tp", "tokens"),
    # in the check each family, with and without experts, on one card and on several
    sweep(
        [
            ("qwen3.5-9b", "1xrtx4090", 1, 1),
            ("qwen3.5-9b", "1xa100-40g", 1, 3),
            ("qwen3.5-27b", "1xh100", 1, 1),
            ("qwen3.5-27b", "2xa100-80g", 2, 3),
            ("qwen3.6-27b", "4xrtx4090", 4, 2),
            ("qwen3.8-27b", "1xh200", 1, 3),
            ("qwen3.5-35b-a3b", "2xh100", 2, 3),
            ("qwen3.5-35b-a3b", "2xa100-80g", 2, 1),
            ("glm-4.5-air", "4xa100-80g", 4, 2),
            ("glm-4.5-air", "4xh100", 4, 1),
            ("deepseek-v3", "8xh200", 8, 1),
            ("glm-4.7-flash", "2xh100", 2, 3),
        ],
        2,
    ),
)
def test_plans_by_hand(name: str, on: str, tp: int, tokens: int) -> None:
    """Each rank: weights, a block of the cache, and the states, of which all are dealt out."""
    plan = planned(name, on, tp=tp, replicas=1, speculative_num_draft_tokens=tokens)
    assert plan.fits
    (model, draft), engine = drafted(name, tokens), plan.engines[0]
    text, delta = model.text, model.text.delta
    slot = 0
    if delta is not None:
        state = delta.value_heads * delta.key_dim * delta.value_dim * (1 + tokens)
        window = delta.channels * (delta.kernel + tokens)
        slot = delta.layers * (state + window) * 2 // tp
    slots = engine.settings.max_batch_size + 2
    for ledger in engine.ledgers:
        assert ledger.bytes_of("weights.draft") == own_draft_weights(model, draft, tp)
        assert ledger.bytes_of("state_cache") == pytest.approx(slots * slot, abs=2 * MIB)
        share = ledger.bytes_of("kv_cache.draft") * text.attention_layers
        assert share == pytest.approx(ledger.bytes_of("kv_cache"), abs=2 * MIB * text.layers)
        assert ledger.bytes_of("draft_graphs") > 0
        assert ledger.margin >= GIB
    assert any("counted, not rehearsed" in text for text in plan.warnings[:1])
    assert plan.throughput is not None
    assert plan.throughput.output_tokens_per_second is None


def test_images_keep_embeddings_for_the_draft() -> None:
    model, draft = drafted("qwen3.5-9b", 3)
    work = Activations(model, Settings(), load_constants())
    text = work.own_prefill(draft, Prefill(tokens=4096, context=8192), 1)
    image = work.own_prefill(draft, Prefill(tokens=4096, context=8192, units=64), 1)
    kept = 2 * 4096 * draft.text.hidden * 2
    pixels = 2 * model.pixel_bytes(64) + model.features(64) * draft.text.hidden * 2
    assert image - text == kept + pixels


def test_flashmla_keeps_sums_of_parts() -> None:
    """By hand, of 64 sequences, 20 heads and 132 SMs: 513 numbers of 32 bits a part and head."""
    model, draft = drafted("glm-4.7-flash", 1)
    work = Activations(model, Settings(speculative_algorithm=GLM), load_constants())
    work.processors = 132
    sums = ((64 + 132) * 513 + 64) * 40 * 4
    assert model.text.mla is not None
    assert work.decode(64) - 128 * work._latent_elements(model.text.mla) * 2 == sums
    assert latent_parts(4 * 20, 132) == 66  # two tiles of 64 heads
    assert work.own_graphs(draft, [64], 0) > sums


def test_latents_need_a_hopper_and_blocks_of_64() -> None:
    for on in ("1xa100-80g", "1xb200"):
        with pytest.raises(
            NoKernelError, match=r"by FlashMLA.* compute capability 9, and none for"
        ):
            planned("glm-4.7-flash", on)
    with pytest.raises(UsageError, match="FlashMLA, for a draft, takes 64 alone"):
        planned("glm-4.7-flash", "1xh100", cache_block_seq_len=32)
    plan = planned("glm-4.7-flash", "1xh100", max_batch_size=8)
    assert plan.kv_tokens % 64 == 0


def test_a_checkpoint_without_such_layers() -> None:
    model = resolve_model("qwen3.5-9b")
    without = replace(model, text=replace(model.text, draft_layers=0))
    with pytest.raises(UsageError, match="no layers that propose tokens"):
        with_draft(without, QWEN, None, 1)
