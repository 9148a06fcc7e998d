"""The generations of older engines: read from data, and what a release reads and divides."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.model import Quantization
from turbofit.core.units import GIB
from turbofit.memory.engines import engine_for
from turbofit.memory.legacy.generations import (
    generation_of,
    legacy_weight_classes,
    quantization_problem,
)
from turbofit.memory.legacy.turbomind import LegacyTurbomind
from turbofit.memory.turbomind.weights import load_constants
from turbofit.memory.versions import is_legacy
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("name", "tp", "version", "said"),
    [
        ("qwen2.5-1.5b", 4, "0.5.3", "a floating point exception"),  # 2 KV heads
        ("qwen2.5-1.5b", 4, "0.6.0", "an assertion"),
        ("qwen2.5-1.5b", 4, "0.6.4", "an assertion"),
        ("qwen2.5-1.5b", 4, "0.6.5", None),
        ("qwen2.5-1.5b", 4, "0.7.0", None),
        ("qwen2.5-1.5b", 2, "0.5.3", None),
        ("internvl2.5-4b", 8, "0.6.4", "2 KV heads over 8 ranks"),
        ("qwen2.5-1.5b", 3, "0.5.3", "takes only powers of two"),
        ("qwen2.5-1.5b", 3, "0.6.0", "2 KV heads over 3 ranks"),
        ("qwen2.5-1.5b", 3, "0.13.0", "only over a multiple of 2 ranks"),
        ("internvl2-8b", 8, "0.5.3", None),
        ("qwen2.5-7b-awq", 8, "0.5.3", "repeats no KV heads"),
    ],
)
def test_heads_and_widths_were_dealt_to_ranks_otherwise(name, tp, version, said):
    found = LegacyTurbomind(version).tp_problem(resolve_model(name), tp)
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize(
    ("engine", "method", "group", "last_without", "first_with"),
    [
        ("turbomind", "gptq", 128, "0.5.3", "0.6.0"),
        ("turbomind", "fp8", 128, "0.8.0", "0.9.0"),
        ("turbomind", "mxfp4", 32, "0.9.2", "0.10.0"),
        ("turbomind", "compressed-tensors", 128, "0.11.1", "0.12.0"),
        ("turbomind", "compressed-tensors", 32, "0.12.2", "0.12.3"),
        ("pytorch", "awq", 128, "0.5.2", "0.5.3"),
        ("pytorch", "fp8", 128, "0.6.5", "0.7.0"),
    ],
)
def test_weights_are_read_since_the_release_that_brought_it(
    engine, method, group, last_without, first_with
):
    packed = Quantization(method=method, bits=8 if method == "fp8" else 4, group_size=group)
    assert str(quantization_problem(engine, last_without, packed)).endswith(
        f"which came with {first_with}"
    )
    assert quantization_problem(engine, first_with, packed) is None
    model = replace(resolve_model("llama-2-7b"), quantization=packed)
    with pytest.raises(UsageError, match=f"does not read {method}"):
        engine_for(model, engine, last_without)


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("0.0.14", "0.0"), ("0.1", "0.1.0"), ("0.2.1", "0.2.0"), ("0.2.2", "0.2.2"),
        ("0.5.2.post1", "0.5.0"), ("v0.5.3", "0.5.3"), ("0.6", "0.6.0"), ("0.6.3", "0.6.3"),
        ("0.13", "0.12.3"), ("0.14.0", "0.14.0"), ("0.17", "0.16.0"),
    ],
)  # fmt: skip
def test_a_version_belongs_to_the_last_generation_that_began(version, first):
    assert generation_of(version).first == first


@pytest.mark.parametrize("version", ["0.18", "0.18.0", "1.2", "latest", ""])
def test_versions_with_an_account_of_their_own_or_none_are_refused(version):
    assert not is_legacy(version)
    with pytest.raises(PackageError):
        generation_of(version)


@pytest.mark.parametrize(
    ("version", "align"),
    [("0.5.3", 1), ("0.6.0", 128), ("0.6.3", 128), ("0.6.4", 64), ("0.11.1", 64), ("0.12.0", 32)],
)
def test_feed_forward_widths_of_each_rank_are_padded_by_the_version_s_own_size(version, align):
    """Qwen2.5-7B's 18,944 channels are 2,368 on each of eight ranks, 37 times 64."""

    def mlp(name, tp):
        model = resolve_model(name)
        return legacy_weight_classes(model, tp, load_constants(), generation_of(version))["mlp"]

    assert mlp("qwen2.5-7b", 8) == 28 * 3 * 3584 * (-(-2368 // align) * align) * 2
    # OpenGVLab/InternVL#1168: 35.25 GiB of experts on each of 16 cards, not 26.44.
    experts = {"0.11.1": 35.25, "0.12.0": 26.4375}.get(version)
    if experts:
        assert mlp("internvl3.5-241b-a28b", 16) == experts * GIB + 94 * 128 * 4096 * 2
