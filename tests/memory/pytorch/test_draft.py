"""Speculative decoding in the PyTorch engine's account, against that engine.

Figures of "eagle" and "glm-4.5-air" are of rehearsals on pretend GPUs with a stand-in for
FlashAttention-3 (Llama-3.1-8B of 8 layers, GLM-4.5-Air of 2); weights and blocks of the others are
what LMDeploy 0.18's own classes make on torch's meta device.
"""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tests.memory.conftest import card, machine_of
from tests.memory.pytorch.test_account import account, problem
from turbofit.core.draft import Draft
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.activations import (
    Activations,
    Prefill,
    activations_of,
    draft_terms,
    draft_weights,
    needed_modules,
    splits,
    without_kernels,
)
from turbofit.memory.pytorch.cache import block_bytes, state_bytes, state_slots
from turbofit.memory.pytorch.weights import load_constants, weight_classes
from turbofit.model.draft_reader import read_draft
from turbofit.model.source import resolve_model

CONSTANTS = load_constants()
FP8 = Quantization(method="fp8", bits=8, group_size=128)


def of_layers(name: str, layers: int) -> Model:
    model = resolve_model(name)
    moe = model.text.moe
    if moe is not None:
        moe = replace(moe, layers=layers - (model.text.layers - moe.layers))
    return replace(model, text=replace(model.text, layers=layers, moe=moe))


def llama(layers: int = 8) -> Model:
    return of_layers("llama-3.1-8b", layers)


def eagle(method: Any = "eagle3", tokens: int = 3) -> Draft:
    text = replace(resolve_model("llama-3.1-8b").text, layers=1)
    return Draft(
        method=method,
        num_speculative_tokens=tokens,
        model="/draft",
        text=text,
        vocab=32000 if method == "eagle3" else text.vocab,
        embeddings=method == "eagle",
    )


def weights(model: Model, settings: Settings) -> int:
    terms = {term.term: term.bytes for term in draft_terms(model, settings)}
    return sum(weight_classes(model, settings.tp).values()) + sum(terms.values())


@pytest.mark.parametrize(
    ("model", "draft", "seen"),
    [
        (llama(), eagle(), 6_491_626_056),
        (llama(), eagle("eagle"), 7_145_144_904),
        (
            of_layers("glm-4.5-air", 2),
            read_draft(resolve_model("glm-4.5-air"), "deepseek_mtp", None, 1),
            14_888_375_576,
        ),
    ],
    ids=["eagle3", "eagle", "glm"],
)
def test_weights_are_the_engines_to_a_kibibyte(model: Model, draft: Draft, seen: int) -> None:
    assert 0 <= seen - weights(model, Settings(speculative=draft)) < 1024


@pytest.mark.parametrize(
    ("name", "fp8", "size", "block"),
    [
        ("glm-4.5-air", False, 7_234_195_968, 12_320_768),
        ("glm-4.5-air", True, 4_860_275_328, 12_320_768),
        ("glm-4.7-flash", False, 2_565_364_480, 3_538_944),
        ("deepseek-v3", False, 26_960_407_552, 4_571_136),
        ("deepseek-v3", True, 15_355_046_624, 4_571_136),
        ("qwen3.5-4b", False, 241_199_104, 2_359_296),
        ("qwen3.5-9b", False, 486_581_248, 2_359_296),
        ("qwen3.5-9b", True, 276_917_248, 2_359_296),
        ("qwen3.5-35b-a3b", False, 1_689_281_536, 1_441_792),
        ("qwen3.5-35b-a3b", True, 853_770_496, 1_441_792),
    ],
)
def test_layers_of_the_target_are_lmdeploys_own(
    name: str, fp8: bool, size: int, block: int
) -> None:
    model = replace(resolve_model(name), quantization=FP8 if fp8 else None)
    method: Any = "qwen3_5_mtp" if "qwen" in name else "deepseek_mtp"
    draft = read_draft(model, method, None, 3)
    assert draft_weights(model, draft, 1) == pytest.approx(size, abs=1024)
    assert block_bytes(model.text, Settings(speculative=draft)) == block


def test_blocks_hold_the_drafts_layers_too() -> None:
    settings = Settings(speculative=eagle())
    assert block_bytes(llama().text, settings) == 2_359_296
    # A draft that is whole on the first rank has all of its KV heads there.
    plain = Settings(tp=2)
    both = block_bytes(llama().text, replace(plain, speculative=eagle()))
    assert both - block_bytes(llama().text, plain) == 64 * 8 * 128 * 2 * 2


@pytest.mark.parametrize(
    ("name", "slot"), [("qwen3.5-9b", 103_415_808), ("qwen3.5-35b-a3b", 129_269_760)]
)
def test_delta_nets_keep_a_state_for_each_token(name: str, slot: int) -> None:
    model = resolve_model(name)
    draft = read_draft(model, "qwen3_5_mtp", None, 3)
    settings = Settings(speculative=draft, max_batch_size=8)
    assert state_bytes(model.text, settings) == slot * state_slots(settings)


@pytest.mark.parametrize(
    ("draft", "tokens", "seen"),
    [
        (eagle(tokens=5), 8192, 1412.8),
        (eagle(tokens=1), 4096, 706.7),
        (eagle(), 1024, 257.4 - 80),  # with a context of 32768, whose flattened keys come besides
    ],
)
def test_a_prefills_peak_is_the_drafts(draft: Draft, tokens: int, seen: float) -> None:
    work = activations_of(llama(), Settings(speculative=draft), CONSTANTS, [card()])
    forecast = work.prefill(Prefill(tokens=tokens, context=tokens)) / MIB
    assert seen <= forecast <= seen * 1.03 + 16


@pytest.mark.parametrize(
    ("tokens", "batch", "seen"), [(3, 16, 100.3), (5, 64, 501.0), (1, 8, 47.5)]
)
def test_logits_of_all_tokens_are_there_when_rows_are_sampled(
    tokens: int, batch: int, seen: float
) -> None:
    settings = Settings(speculative=eagle(tokens=tokens), max_batch_size=batch)
    forecast = activations_of(llama(), settings, CONSTANTS, [card()]).sampling(batch) / MIB
    assert seen <= forecast <= seen * 1.03 + 16


def test_more_tokens_a_step_take_more_of_everything() -> None:
    model = llama()
    plain = Activations(model, Settings(), CONSTANTS)
    sizes = [
        activations_of(model, Settings(speculative=eagle(tokens=n)), CONSTANTS, [card()])
        for n in (1, 2, 5)
    ]
    for step in ("decode", "sampling"):
        taken = [getattr(work, step)(16) for work in (plain, *sizes)]
        assert taken == sorted(set(taken))
    assert plain.graph_buffers([1, 2]) == plain.further_pool() == 0
    held = [work.graph_buffers([256, 512]) for work in sizes]
    assert held == sorted(set(held))


def test_the_cache_is_shared_and_the_rest_is_taken_from_it() -> None:
    plain, drafted = (
        account(llama(), machine_of(1), max_batch_size=16, session_len=4096, **more)
        for more in ({}, {"speculative": eagle()})
    )
    assert drafted.block_bytes == plain.block_bytes * 9 // 8
    assert drafted.free < plain.free
    ratio = drafted.best_ratio()
    assert ratio
    assert drafted.tokens_at(ratio) < plain.tokens_at(plain.best_ratio() or 0)
    told = {term.term: term for term in drafted.at(ratio).ledgers[0].ledger}
    assert told["weights.draft"].bytes == draft_weights(llama(), eagle(), 1)
    # Embeddings that give way to the target's are there while the draft loads.
    assert drafted.at(ratio).ledgers[0].load_peak - plain.at(0.5).ledgers[0].load_peak > 1800 * MIB


def test_a_draft_apart_is_charged_to_every_rank() -> None:
    options = {"tp": 2, "session_len": 4096, "speculative": eagle()}
    ledgers = account(llama(), machine_of(2), **options).at(0.5).ledgers
    held = [{t.term: t for t in one.ledger}["weights.draft"] for one in ledgers]
    assert held[0].bytes == held[1].bytes
    assert "on the first rank alone" in held[0].note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"quant_policy": 8}, "does not draft"),
        ({"model_format": "awq"}, "taken for the draft's weights"),
    ],
)
def test_settings_that_do_not_draft(changes: dict[str, Any], words: str | None) -> None:
    packed = Quantization(method="awq", bits=4, group_size=128)
    model = replace(llama(), quantization=packed if "model_format" in changes else None)
    said = problem(model, speculative=eagle(), **changes)
    assert said is None if words is None else words in str(said)
    assert problem(model, **changes) is None


def test_latents_are_drafted_for_in_blocks_of_64() -> None:
    model = resolve_model("glm-4.7-flash")
    draft = read_draft(model, "deepseek_mtp", None, 1)
    assert problem(model, speculative=draft) is None
    said = problem(model, speculative=draft, cache_block_seq_len=32)
    assert "takes blocks of 64" in str(said)


# Which cards verify drafts, and with how many parts of long sequences.

LLAMA = resolve_model("llama-3.1-8b").text
DENSE = Draft(method="eagle", text=LLAMA, vocab=LLAMA.vocab, embeddings=True)
LATENT = read_draft(resolve_model("glm-4.7-flash"), "deepseek_mtp", None, 1)


@pytest.mark.parametrize(
    ("kv_heads", "processors", "count"),
    [(8, 132, 15), (8, 82, 9), (1, 132, 109), (4, 108, 23), (32, 28, 1), (128, 132, 1)],
)
def test_parts_fill_the_multiprocessors(kv_heads: int, processors: int, count: int) -> None:
    assert splits(kv_heads, processors) == count


@pytest.mark.parametrize(
    ("capability", "dense", "latent"),
    [
        ((7, 5), False, False), ((8, 0), True, False), ((8, 9), True, False),
        ((9, 0), True, True), ((10, 0), False, False), ((12, 0), False, False),
    ],
)  # fmt: skip
def test_cards(capability: tuple[int, int], dense: bool, latent: bool) -> None:
    gpus = [card(), replace(card(1), compute_capability=capability)]
    assert (without_kernels(DENSE, gpus) is None) is dense
    assert (without_kernels(LATENT, gpus[1:]) is None) is latent


def test_packages_are_named_with_their_modules() -> None:
    assert needed_modules(DENSE.text) == ("FlashAttention-3's flash_attn_interface",)
    assert needed_modules(LATENT.text) == ("FlashMLA's flash_mla",)
