"""Generations of older LMDeploys, read from data."""

from __future__ import annotations

import pytest

from turbofit.core.errors import PackageError
from turbofit.memory.legacy.generations import (
    generation_of,
    generations,
    torch_generation_of,
    torch_generations,
)
from turbofit.memory.versions import is_legacy


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("0.0.14", "0.0"), ("0.1", "0.1.0"), ("0.2.1", "0.1.0"), ("0.2.2", "0.2.2"),
        ("0.5.2.post1", "0.5.0"), ("v0.5.3", "0.5.3"), ("0.6", "0.6.0"), ("0.6.3", "0.6.2"),
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


def test_llava_left_four_times_its_tower_in_one_version_only():
    assert generation_of("0.2.6").vision.held("LlavaLlamaForCausalLM") == 4
    assert generation_of("0.2.6").vision.held("QWenLMHeadModel") == 1
    assert generation_of("0.3.0").vision.held("LlavaLlamaForCausalLM") == 1


def test_the_pytorch_engine_has_generations_too():
    old, new = torch_generation_of("0.5.2"), torch_generation_of("0.10.2")
    assert (old.runtime.bytes, old.runtime.batch_rows) == (7, 0)
    assert (new.runtime.bytes, new.runtime.batch_rows) == (2, 2)
    assert (old.tower, new.tower) == ("front_end", "engine")
    assert (old.prefill, torch_generation_of("0.6.0").prefill) == (4096, 8192)
    assert torch_generation_of("0.1.0") == torch_generations()[0]
