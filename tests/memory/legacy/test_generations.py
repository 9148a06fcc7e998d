"""Generations of older LMDeploys, read from data."""

from __future__ import annotations

import pytest

from turbofit.core.errors import PackageError
from turbofit.memory.legacy.generations import (
    generation_of,
    generations,
    legacy_constants,
    torch_generation_of,
    torch_generations,
)
from turbofit.memory.versions import is_legacy


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("0.0.14", "0.0"),
        ("0.1", "0.1.0"),
        ("0.2.1", "0.1.0"),
        ("0.2.2", "0.2.2"),
        ("0.4.1", "0.4.0"),
        ("0.5.2.post1", "0.5.0"),
        ("v0.5.3", "0.5.3"),
        ("0.6", "0.6.0"),
        ("0.6.3", "0.6.2"),
        ("0.6.4", "0.6.4"),
        ("0.7.3", "0.6.5"),
        ("0.9.2", "0.9.0"),
        ("0.12.2", "0.12.0"),
        ("0.13", "0.12.3"),
        ("0.14.0", "0.14.0"),
        ("0.15.0", "0.15.0"),
        ("0.17", "0.16.0"),
    ],
)
def test_a_version_belongs_to_the_last_generation_that_began(version, first):
    assert generation_of(version).first == first


@pytest.mark.parametrize("version", ["0.18", "0.18.0", "1.2", "latest", ""])
def test_versions_with_an_account_of_their_own_or_none_are_refused(version):
    assert not is_legacy(version)
    with pytest.raises(PackageError):
        generation_of(version)


def test_every_entry_is_complete_ordered_and_names_its_sources():
    for known in (generations(), torch_generations()):
        firsts = [tuple(int(n) for n in one.first.split(".")) for one in known]
        assert firsts == sorted(firsts)
        assert all(one.source for one in known)


def test_what_an_entry_does_not_say_the_one_before_does():
    old, new = generation_of("0.5.2"), generation_of("0.5.3")
    assert (old.forward, new.forward) == ("session", "prefill")
    assert new.cache == old.cache
    assert new.buffers == old.buffers
    assert new.source != old.source


def test_how_the_cache_was_sized():
    assert generation_of("0.0.14").cache.of == "slots"
    assert (generation_of("0.2.0").cache.of, generation_of("0.2.0").cache.default) == ("total", 0.5)
    assert (generation_of("0.2.2").cache.of, generation_of("0.2.2").cache.default) == ("free", 0.8)
    assert generation_of("0.2.6").cache.block_tokens == 128
    assert generation_of("0.3.0").cache.block_tokens == 64
    assert generation_of("0.12.3").cache.after_buffers
    assert not generation_of("0.15.0").cache.after_buffers
    assert generation_of("0.15.0").cache.objects


def test_where_the_tower_was():
    places = {v: generation_of(v).vision for v in ("0.2.6", "0.4.1", "0.4.2", "0.15.0", "0.16.0")}
    assert places["0.2.6"].loaded == "after_cache"
    assert (places["0.4.1"].loaded, places["0.4.1"].placed) == ("before_cache", "first")
    assert places["0.4.2"].placed == "balanced"
    assert places["0.15.0"].runs == "torch"
    assert places["0.16.0"].runs == "native"
    assert places["0.16.0"].pinned_pixels


def test_llava_left_four_times_its_tower_in_one_version_only():
    assert generation_of("0.2.6").vision.held("LlavaLlamaForCausalLM") == 4
    assert generation_of("0.2.6").vision.held("QWenLMHeadModel") == 1
    assert generation_of("0.3.0").vision.held("LlavaLlamaForCausalLM") == 1


@pytest.mark.parametrize(
    ("version", "name", "batch"),
    [
        ("0.5.3", "NVIDIA A100-SXM4-80GB", 128),
        ("0.6.0", "NVIDIA A100-SXM4-80GB", 256),
        ("0.7.3", "NVIDIA H100 80GB HBM3", 512),
        ("0.10.0", "NVIDIA H200", 1024),
        ("0.10.0", "NVIDIA GeForce RTX 3090", 128),
    ],
)
def test_default_batch_by_name(version, name, batch):
    assert generation_of(version).batch_size(name) == batch


def test_the_pytorch_engine_has_generations_too():
    old, new = torch_generation_of("0.5.2"), torch_generation_of("0.10.2")
    assert (old.runtime.bytes, old.runtime.batch_rows) == (7, 0)
    assert (new.runtime.bytes, new.runtime.batch_rows) == (2, 2)
    assert (old.tower, new.tower) == ("front_end", "engine")
    assert (old.prefill, torch_generation_of("0.6.0").prefill) == (4096, 8192)
    assert torch_generation_of("0.1.0") == torch_generations()[0]


def test_constants_are_read():
    assert legacy_constants().tuning_tokens[-1] == 8192
