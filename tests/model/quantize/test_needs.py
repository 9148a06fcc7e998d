"""What a quantisation takes: by hand, and by what llm-compressor's code took."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.units import GIB, MIB
from turbofit.model.presets import preset_model
from turbofit.model.quantize.needs import awq_needs, needs_of
from turbofit.model.quantize.scheme import scheme_for


def needs(name, samples=256, tokens=2048):
    model = preset_model(name)
    return needs_of(model, scheme_for(model), samples, tokens)


def test_the_widest_hessian_decides_the_card() -> None:
    seven = needs("qwen2.5-vl-7b")
    widest = 18944**2 * 4
    assert seven.card_terms["inverse"] == 4 * widest + widest // 1024
    assert seven.card == sum(seven.card_terms.values())
    assert needs("qwen2.5-vl-7b", tokens=512).card < seven.card
    assert "head" not in seven.card_terms  # llm-compressor runs none while it calibrates


def test_experts_wait_with_their_hessians_on_the_card() -> None:
    terms = needs("qwen3-30b-a3b").card_terms
    experts = 128 * (2 * 2048**2 + 768**2) * 4
    attention = (3 * 2048**2 + 4096**2) * 4
    assert terms["hessians"] == experts + attention


def test_the_card_of_experts_is_what_torch_allocated() -> None:
    """7,059.6 MiB at the peak of two layers of 128 experts, in attention (bench/quantize)."""
    took = needs("qwen3-30b-a3b")
    assert "attention" in took.card_terms
    assert 0 <= (took.card - took.card_terms["pool"]) / MIB - 7059.6 < 10
    # With a page of 20 MiB for each that a tensor touches: the least that torch held.
    assert 7386 <= took.card / MIB < 1.1 * 7386


def test_samples_in_host_memory_are_what_llm_compressor_says_it_holds() -> None:
    """69,074,944 bytes for 16 samples of 1,024 tokens (``IntermediatesCache.size()``)."""
    held = needs("qwen2.5-0.5b", samples=16, tokens=1024).host_terms["samples"]
    assert 69_074_944 <= held < 1.1 * 69_074_944


def test_host_memory_grows_with_samples_and_disk_does_not() -> None:
    many, few = needs("llama-3.1-8b", samples=256), needs("llama-3.1-8b", samples=64)
    assert many.host - few.host == 192 * many.host_terms["samples"] // 257
    assert many.disk == few.disk
    assert 4 * GIB < many.disk < many.source / 2


def test_layers_that_propose_tokens_are_copied_in_16_bits() -> None:
    """Qwen3.5-27B's mtp: a layer of full attention, what joins two states, and four norms."""
    model = preset_model("qwen3.5-27b")
    scheme = scheme_for(model)
    plain = replace(model, text=replace(model.text, draft_layers=0))
    with_draft, without = (needs_of(one, scheme, 64, 512) for one in (model, plain))
    text = model.text
    attention = text.hidden * text.head_dim * (3 * text.heads + 2 * text.kv_heads)
    layer = attention + 3 * text.hidden * text.intermediate
    copied = 2 * (layer + 2 * text.hidden**2)
    assert 0 <= with_draft.disk - without.disk - copied < MIB
    assert with_draft.source - without.source == with_draft.disk - without.disk


@pytest.mark.parametrize(
    ("model", "printed"),  # lmdeploy#2873: InternVL2.5-78B's language model at its layers, in GiB
    [("internvl2.5-78b", 19.95)],
)
def test_auto_awq_at_a_layer_is_what_a_log_printed(model, printed) -> None:
    known = preset_model(model)
    tokens = 128 * 2048
    took = awq_needs(known)
    norm = 6 * tokens * known.text.hidden * 2 + known.text.vocab * known.text.hidden * 2
    assert took.card == norm
    assert printed * GIB < took.card
    assert awq_needs(preset_model("qwen3-vl-8b")).why_not
    assert took.card - awq_needs(known, samples=64).card > 100 * MIB
