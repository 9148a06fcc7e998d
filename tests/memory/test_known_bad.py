from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from tests.memory.conftest import launch_on, machine_of
from turbofit.core.model import Quantization
from turbofit.core.struct import NA
from turbofit.memory import known_bad
from turbofit.memory.known_bad import KnownProblem, known_problems, largest_batch
from turbofit.model.source import resolve_model

ROWS = {row.id: row for row in known_bad.all_problems()}
FP8 = Quantization(method="fp8", bits=8, group_size=128)
AWQ = Quantization(method="awq", bits=4, group_size=128)


def launch(model: str, capability=(8, 6), weights=None, name: str = "", **options):
    """A launch of a preset model on cards of a capability."""
    machine = machine_of(options.get("tp", 1))
    gpus = tuple(replace(gpu, compute_capability=capability) for gpu in machine.gpus)
    found = resolve_model(model)
    if weights is not None:
        found = replace(found, quantization=weights)
    found = replace(found, name=name or found.name)
    return launch_on(replace(machine, gpus=gpus), found, **options)


PREFIXES = {"enable_prefix_caching": True}
#: For each row: a launch that has it, its engine, versions at its ends, versions outside, and what
#: is different in launches that do not have it.
CASES = {
    "image-addresses": (
        {"model": "internvl2-8b"}, "turbomind", "0.7.3 0.12.0 0.12.2", "0.12.3 0.13.0 0.18",
        [{"model": "qwen2.5-7b"}],
    ),
    "image-redirects": (
        {"model": "qwen2-vl-7b"}, "pytorch", "0.12.3 0.14.0", "0.12.2 0.15.0 0.18",
        [{"model": "qwen2.5-7b"}],
    ),
    "fp8-before-hopper": (
        {"model": "qwen2.5-7b", "weights": FP8}, "turbomind", "0.14.0 0.16 0.16.1",
        "0.13.0 0.17.0 0.18", [{"capability": (9, 0)}, {"weights": None}, {"capability": NA}],
    ),
    "cuda-ipc-odd-logits": (
        {"model": "internvl2-8b", "tp": 2, "communicator": "cuda-ipc"}, "turbomind", "0.7.2 0.15.0",
        "0.7.1 0.16.0 0.18",
        [{"communicator": "nccl"}, {"tp": 8}, {"tp": 1}, {"model": "qwen2-vl-7b"}],
    ),
    "no-turboquant-yet": (
        {"model": "qwen2.5-7b", "quant_policy": 42}, "pytorch", "0.10 0.12.3", "0.13.0 0.18",
        [{"quant_policy": 8}, {"quant_policy": 0}],
    ),
    "no-fp8-cache-yet": (
        {"model": "qwen2.5-7b", "quant_policy": 17}, "pytorch", "0.10 0.13.0", "0.14.0 0.18",
        [{"quant_policy": 42}, {"quant_policy": 0}],
    ),
    "qwen3-next-interval": (
        {"model": "qwen3-next-80b-a3b"}, "pytorch", "0.18", "", [{"model": "qwen3.5-35b-a3b"}],
    ),
    "cogvlm-prompts-that-meet": (
        {"model": "cogvlm2-19b", "tp": 2, "max_batch_size": 2}, "pytorch", "0.6.5 0.16.0 0.18 0.19",
        "0.6.4", [{"max_batch_size": 1}, {"model": "qwen2-vl-7b"}],
    ),
    "kv-int4-qwen2": (
        {"model": "qwen2.5-vl-7b", "quant_policy": 4}, "turbomind", "0.6.4 0.18 0.19", "",
        [{"quant_policy": 8}, {"model": "internvl2-8b"}],
    ),
    "kv-int8-qwen2": (
        {"model": "qwen2.5-7b", "quant_policy": 8}, "pytorch", "0.6.4 0.18", "",
        [{"quant_policy": 4}, {"quant_policy": 0}, {"model": "qwen3-8b"}],
    ),
    "internvit-6b-tensor-parallel": (
        {"model": "internvl2-26b", "tp": 2}, "pytorch", "0.7.0 0.9.1", "0.6.5 0.9.2",
        [{"tp": 1}, {"model": "internvl2-8b"}],
    ),
    "gemma3-float16": (
        {"model": "gemma-3-4b", "dtype": "float16"}, "pytorch", "0.8.0 0.18", "",
        [{"dtype": "bfloat16"}, {"model": "qwen2-vl-7b"}],
    ),
    "shared-memory-ampere-ada": (
        {"model": "qwen3-8b", "capability": (8, 9)}, "pytorch", "0.8.0", "0.7.3 0.9.0",
        [{"capability": (8, 0)}, {"capability": (9, 0)}],
    ),
    "shared-memory-volta-turing": (
        {"model": "qwen3-8b", "capability": (7, 5)}, "pytorch", "0.8.0 0.9.1", "0.7.3 0.9.2",
        [{"capability": (8, 0)}],
    ),
    "shared-memory-ampere-ada-ranks": (
        {"model": "internvl3.5-8b", "tp": 2}, "pytorch", "0.10 0.10.2 0.18", "0.9.2",
        [{"tp": 1}, {"capability": (8, 0)}],
    ),
    "shared-memory-turing-wide-heads": (
        {"model": "qwen3.5-35b-a3b", "capability": (7, 5), "tp": 2}, "pytorch", "0.12.0 0.18",
        "0.11.1", [{"capability": (7, 0), "tp": 1}, {"model": "qwen3-8b", "tp": 1}],
    ),
    "int4-volta": (
        {"model": "qwen2.5-7b", "capability": (7, 0), "weights": AWQ}, "turbomind", "0.4.2 0.5.3",
        "0.6.0 0.18", [{"capability": (7, 5)}, {"weights": None}],
    ),
    "internvl2-40b-awq": (
        {"model": "internvl2-40b", "weights": AWQ}, "turbomind", "0.4.1 0.5.0", "0.5.1",
        [{"weights": None}, {"model": "internvl2-26b"}],
    ),
    "prefix-cache-images": (
        {"model": "internvl2-8b", **PREFIXES}, "turbomind", "0.4.2 0.10.0", "0.10.1 0.18",
        [{"model": "qwen2.5-7b"}],
    ),
    "prefix-cache-images-pytorch": (
        {"model": "qwen2-vl-7b", **PREFIXES}, "pytorch", "0.6.0 0.10.0", "0.10.1 0.18",
        [{"model": "qwen2.5-7b"}],
    ),
    "prefix-cache-off-turbomind-qwen3.5": (
        {"model": "qwen3.5-35b-a3b", **PREFIXES}, "turbomind", "0.12.0 0.14.0", "0.15.0 0.18",
        [{"model": "internvl2-8b"}],
    ),
    "prefix-cache-off-turbomind": (
        {"model": "internvl2-8b", **PREFIXES}, "turbomind", "0.10.1 0.15.0", "0.10.0 0.16.0 0.18",
        [{"model": "qwen3.5-27b"}],
    ),
    "prefix-cache-off-turbomind-front-end": (
        {"model": "llava-1.5-7b", **PREFIXES}, "turbomind", "0.10.1 0.12.3", "0.10.0 0.14.0",
        [{"model": "internvl2-8b"}],
    ),
    "prefix-cache-off-pytorch-all": (
        {"model": "qwen3-vl-8b", **PREFIXES}, "pytorch", "0.10.1 0.13.0", "0.10.0 0.14.0 0.18",
        [{"model": "qwen3-8b"}],
    ),
    "prefix-cache-off-pytorch": (
        {"model": "qwen2.5-vl-7b", **PREFIXES}, "pytorch", "0.14.0 0.18", "0.10.0 0.13.0",
        [{"model": "qwen3-vl-8b"}],
    ),
    "prefix-cache-input-embeddings": (
        {"model": "qwen2.5-7b", **PREFIXES}, "pytorch", "0.9.1 0.18", "",
        [{"enable_prefix_caching": False}],
    ),
    "delta-experts-volta-speed": (
        {"model": "qwen3.6-35b-a3b-awq", "capability": (7, 0)}, "turbomind", "0.12.2 0.18",
        "0.12.1", [{"capability": (7, 5)}, {"model": "qwen3.6-27b-awq"},
                   {"model": "qwen3.6-35b-a3b-gptq-int4"}],
    ),
}  # fmt: skip


def ids(*found: KnownProblem) -> list[str]:
    return [row.id for row in found]


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.id)
def test_a_row_is_said_of_its_launches_and_versions_alone(row: KnownProblem):
    options, engine, inside, outside, others = CASES[row.id]
    has_it, (first, *_) = launch(**options), inside.split()
    for version in inside.split():
        assert row.id in ids(*known_problems(has_it, engine, version)), version
    for version in outside.split():
        assert row.id not in ids(*known_problems(has_it, engine, version)), version
    if PREFIXES.items() <= options.items():
        others = [*others, dict.fromkeys(PREFIXES, False)]
    for change in others:
        other = launch(**{**options, **change})
        assert row.id not in ids(*known_problems(other, engine, first)), change
    if len(row.engines) == 1:
        wrong = "pytorch" if engine == "turbomind" else "turbomind"
        assert row.id not in ids(*known_problems(has_it, wrong, first))
    # It names threads, and who confirms it.
    assert row.sources
    place = r"(issues|pull)/\d+|blob/[0-9a-f]{40}/[\w./-]+"
    for source in row.sources:
        assert re.fullmatch(rf"https://github\.com/[\w.-]+/[\w.-]+/({place})", source)
    assert re.search(r"maintainer|users|fix", row.confirmed)
    assert row.sources[0] in row.cause
    assert row.instead in row.warning
    assert row.last is None or row.has(row.last)
    assert row.first is None or row.has(row.first)


def test_the_fatal_comes_first_and_an_unreadable_version_has_what_is_not_mended():
    both = launch("qwen2.5-7b", (8, 6), FP8, quant_policy=4)
    assert ids(*known_problems(both, "turbomind", "0.16.0")) == [
        "fp8-before-hopper", "kv-int4-qwen2",
    ]  # fmt: skip
    assert ids(*known_problems(both, "turbomind", "main")) == ["kv-int4-qwen2"]


def test_the_largest_batch_is_below_the_one_that_ends_an_engine():
    assert largest_batch(launch("cogvlm-17b", max_batch_size=1), "pytorch", "0.18") == 1
    assert largest_batch(launch("cogvlm-17b"), "pytorch", "0.6.4") is None
    assert largest_batch(launch("qwen2-vl-7b"), "pytorch", "0.18") is None
