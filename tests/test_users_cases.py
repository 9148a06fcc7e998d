"""Our users' cases: the one command that a person would type, and what must be said to it.

Figures of the account are not repeated here: what is asserted are relations and bounds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from turbofit.cli.main import main
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB, format_bytes

#: A start that fails exits with it.
NOT_SERVED = 3


class Said(NamedTuple):
    """What a command line ended with: a plan, or an error with its hint."""

    code: int
    plan: Any
    error: dict[str, Any]

    @property
    def spare(self) -> int:
        return min(gpu.headroom for gpu in self.plan.ledgers)

    @property
    def cards(self) -> list[int]:
        return sorted(i for group in self.plan.groups for i in group)

    def remedy(self, word: str) -> str:
        """The effect of the first remedy that names the word."""
        return next(one.effect for one in self.plan.remedies if word in one.change)


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Said]:
    def run(command: str) -> Said:
        code = main([*shlex.split(command), "--json"])
        text = capsys.readouterr().out
        document = json.loads(text)
        if "error" in document:
            return Said(code, None, document["error"])
        return Said(code, Plan.from_json(text), {})

    return run


def fits(said: Said, engine: str, cards: list[int]) -> Plan:
    """It was planned for that engine on those cards, with the margin left on each, and says so."""
    plan = said.plan
    assert said.code == 0
    assert plan.fits
    assert (plan.backend.name, said.cards) == (engine, cards)
    for gpu in plan.ledgers:
        assert gpu.headroom >= gpu.margin >= 256 * MIB
        assert max(gpu.peak, gpu.load_peak) + gpu.headroom + gpu.reserved == gpu.total
    each = " on each" if len(cards) > 1 else ""
    assert plan.verdict.endswith(f"; {format_bytes(said.spare)} stay free{each}")
    assert (
        plan.engines[0].kv.tokens
        >= plan.promise.context
        >= plan.engines[0].settings.session_len
        > 0
    )
    assert all(engine.command is not None for engine in plan.engines)
    return plan


def refused(said: Said) -> Plan:
    """It would not serve, and that is said with a change that would make it."""
    assert said.code == NOT_SERVED
    assert not said.plan.fits
    assert said.plan.verdict.startswith("does not fit")
    assert any(one.effect.startswith("fits") for one in said.plan.remedies)
    return said.plan


def flag(plan: Plan, name: str) -> str:
    """An option of the first engine's command line."""
    argv = plan.engines[0].command.argv
    return argv[argv.index(name) + 1]


# 1. InternVL2-8B on four RTX 3090 without peer access


def test_1_internvl_with_the_tp_that_was_asked(typed) -> None:
    plan = fits(typed("plan internvl2-8b --on 4xrtx3090 --tp 4"), "turbomind", [0, 1, 2, 3])
    assert (plan.tp, plan.replicas, plan.engines[0].settings.dtype) == (4, 1, "bfloat16")
    assert "no peer access" in plan.verdict
    assert plan.promise.limits.max_dynamic_patch == 12
    assert flag(plan, "--tp") == "4"
    assert (
        float(flag(plan, "--cache-max-entry-count"))
        == plan.engines[0].settings.cache_max_entry_count
    )
    # One thousandth more would not leave the margin.
    more = plan.engines[0].settings.cache_max_entry_count + 0.001
    beyond = typed(
        f"predict internvl2-8b --on 4xrtx3090 --tp 4 --cache-max-entry-count {more:.3f}"
        f" --max-prefill-token-num {plan.engines[0].settings.max_prefill_token_num}"
        f" --max-batch-size {plan.engines[0].settings.max_batch_size} --max-dynamic-patch 12"
        " --enable-prefix-caching"
    )
    assert beyond.spare < beyond.plan.ledgers[0].margin
    assert beyond.code == NOT_SERVED
    # Where turbofit may choose, it is no slower.
    chosen = fits(typed("plan internvl2-8b --on 4xrtx3090"), "turbomind", [0, 1, 2, 3])
    assert chosen.tp * chosen.replicas == 4
    assert chosen.throughput is not None
    assert plan.throughput is not None
    assert chosen.throughput.requests_per_second >= plan.throughput.requests_per_second


# What serves: its engine, its cards, and GPUs of a copy times copies where that is the point.

ALL, BOTH, FIRST = [0, 1, 2, 3], [0, 1], [0]


@pytest.mark.parametrize(
    ("command", "engine", "cards", "shape"),
    [
        ("internvl2-8b --on 4xrtx3090:free=15GiB", "turbomind", ALL, (2, 2)),
        ("internvl2-8b-awq --on 4xrtx3090:free=6GiB --tp 4", "turbomind", ALL, (4, 1)),
        ("llava-1.5-7b --on 4xrtx3090:free=12GiB", "pytorch", ALL, None),
        ("llava-1.5-7b --on 1xl4:free=14.8GiB --quant-policy 8", "pytorch", FIRST, (1, 1)),
        ("qwen2-vl-7b --on 2xrtx4090", "turbomind", BOTH, (1, 2)),
        ("qwen2-vl-7b --on 2xrtx4090 --tp 2", "turbomind", BOTH, (2, 1)),
        ("qwen2-vl-7b --on 2xrtx4090:free=16GiB", "turbomind", BOTH, (2, 1)),
        ("cogvlm-17b --on 4xrtx3090 --replicas 2 --tp 2", "pytorch", ALL, (2, 2)),
        ("llava-onevision-7b --on 2xrtx4090:free=16GiB", "transformers", BOTH, None),
        ("llama-3.2-11b-vision --on 2xrtx4090:free=16GiB", "transformers", BOTH, None),
    ],
)
def test_what_serves(
    typed, command: str, engine: str, cards: list[int], shape: tuple[int, int] | None
) -> None:
    plan = fits(typed(f"plan {command}"), engine, cards)
    assert shape in (None, (plan.tp, plan.replicas))


@pytest.mark.parametrize(
    ("command", "cause", "remedy"),
    [
        ("internvl2-8b --on 4xrtx3090:free=6GiB --tp 4", "while loading", "InternVL2-8B-AWQ"),
        ("llava-1.5-7b --on 1xrtx3090:free=12GiB", "while loading", "2 x NVIDIA"),
        ("llava-1.5-7b --on 1xl4:free=14.8GiB", "the cache holds", "--quant-policy 8"),
        # As their message had it: 7.91 of 22.03 GiB were another process's.
        ("llava-1.5-7b --on 1xl4:free=14.12GiB", "holds 0 KV blocks", "2 x NVIDIA L4"),
        ("qwen2-vl-7b --on 1xv100-32g:free=18GiB", "while loading", "AWQ"),
        ("qwen2-vl-7b --on 2xrtx4090:free=16GiB --tp 1", "while loading", "leave --tp to"),
        ("cogvlm-17b --on 2xrtx3090:free=18GiB", "no room for a cache", "4 x NVIDIA"),
        ("cogvlm-17b --on 2xrtx3090:free=17GiB", "while loading", "4 x NVIDIA"),
    ],
)
def test_what_does_not_serve_and_what_would(typed, command: str, cause: str, remedy: str) -> None:
    said = typed(f"plan {command}")
    assert cause in refused(said).verdict
    assert said.remedy(remedy).startswith("fits")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        # By the name that its authors gave it, with a LoRA.
        (
            "plan llava-v1.5-7b-lora --on 4xrtx3090",
            [
                "llava-hf/llava-1.5-7b-hf",
                "LoRA",
                "turbofit merge",
                "hf download",
                "13.2 GiB of weights and fits: LLaVA-1.5-7B on GPU 0-3",
            ],
        ),
        ("plan qwen2-vl-7b --on 1xv100-32g --dtype bfloat16", ["no bfloat16"]),
        ("plan cogvlm-17b --on 2xrtx3090 --replicas 2 --tp 2", ["4 GPUs are needed"]),
        ("plan cogvlm-17b --on 2xrtx3090 --max-batch-size 2", ["two prompts", "more replicas"]),
        ("predict llava-onevision-7b --on 2xrtx4090", ["turbofit plan"]),
        ("predict llama-3.2-11b-vision --on 2xrtx4090", ["turbofit plan"]),
    ],
)
def test_what_is_refused_and_what_to_do(typed, command: str, words: list[str]) -> None:
    said = typed(command)
    assert said.code == 2
    assert [word for word in words if word not in str(said.error)] == []


# 2. LLaVA-v1.5-7B with a LoRA on four RTX 3090


@pytest.mark.slow
def test_2_llava_with_its_lora_merged(typed, tmp_path, capsys) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.model.merge.cases import make_clip, make_llava_lora, make_vicuna

    base, lora = make_vicuna(tmp_path / "vicuna-7b-v1.5"), make_llava_lora(tmp_path / "lora")
    tower, out = make_clip(tmp_path / "clip", transformers), tmp_path / "llava-v1.5-7b-merged"
    assert main(["merge", str(base), str(lora), str(out), "--vision-tower", str(tower)]) == 0
    assert f"turbofit plan {out}" in " ".join(capsys.readouterr().out.split())
    said = typed(f"plan {out} --on 4xrtx3090")
    assert (said.code, said.plan.model.architecture) == (0, "LlavaForConditionalGeneration")
    assert (said.plan.backend.name, said.plan.model.source.sizes) == ("pytorch", "file")


def test_2_llava_on_four_cards_and_on_one(typed) -> None:
    plan = fits(typed("plan llava-1.5-7b --on 4xrtx3090"), "pytorch", [0, 1, 2, 3])
    assert plan.engines[0].settings.dtype == "float16"
    assert any("transformers<5" in text for text in plan.warnings)
    one = fits(typed("plan llava-1.5-7b --on 4xrtx3090 --gpus 0"), "pytorch", FIRST)
    assert one.kv_tokens < plan.kv_tokens
    # What `offload_dir` would have done, and its price.
    offloaded = typed("plan llava-1.5-7b --on 1xrtx3090:free=12GiB,ram=64GiB --engine transformers")
    assert offloaded.code == 0
    assert "cpu" in (offloaded.plan.engines[0].device_map or {}).values()
    assert any("s a token at the best" in text for text in offloaded.plan.warnings)


# 3. LLaVA on an L4 that others share


def test_3_llava_on_what_is_free(typed) -> None:
    plans = [
        fits(typed(f"plan llava-1.5-7b --on 1xl4:free={free}"), "pytorch", [0])
        for free in ("22GiB", "19GiB", "17GiB", "15.5GiB")
    ]
    tokens = [plan.engines[0].kv.tokens for plan in plans]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == len(tokens)
    sessions = [plan.engines[0].settings.session_len for plan in plans]
    assert sessions == sorted(sessions, reverse=True)
    assert sessions[0] == 4096
    assert all(plan.tp == 1 for plan in plans)


# 4. Qwen2-VL-7B on a V100 32 GB, then on two RTX 4090


def test_4_qwen_on_a_v100(typed) -> None:
    plan = fits(typed("plan qwen2-vl-7b --on 1xv100-32g"), "turbomind", [0])
    assert plan.engines[0].settings.dtype == "float16"
    assert any("no bfloat16" in reason for reason in plan.reasons)
    assert plan.promise.limits.max_pixels_per_image is not None


# 4, wished for: LLaVA-OneVision and Llama-3.2-Vision


@pytest.mark.parametrize("model", ["llava-onevision-7b", "llama-3.2-11b-vision"])
def test_4_what_lmdeploy_does_not_run(typed, model: str) -> None:
    for on, visible in (("1xv100-32g", 1), ("2xrtx4090", 2)):
        one = fits(typed(f"plan {model} --on {on}"), "transformers", [0])
        assert one.engines[0].settings.dtype == ("float16" if "v100" in on else one.model.dtype)
        assert one.engines[0].settings.max_batch_size == 1
        assert set((one.engines[0].device_map or {}).values()) == {0}
        assert any("serial and slower" in text for text in one.warnings)
        assert len([text for text in one.warnings if text.startswith("not used")]) == visible - 1
        assert one.engines[0].command.argv[0] == "turbofit-fallback"
    # Copies and a split are asked for by name.
    plan = fits(typed(f"plan {model} --on 2xrtx4090 --tp 2"), "transformers", [0, 1])
    assert plan.replicas == 1
    assert set((plan.engines[0].device_map or {}).values()) == {0, 1}
    assert plan.engines[0].settings.session_len >= one.engines[0].settings.session_len
    copies = fits(typed(f"plan {model} --on 2xrtx4090 --replicas 2"), "transformers", [0, 1])
    assert copies.groups == ((0,), (1,))


# 5. CogVLM on two RTX 3090


@pytest.mark.parametrize("model", ["cogvlm-17b", "cogvlm2-19b"])
def test_5_cogvlm_is_one_model_over_both_cards(typed, model: str) -> None:
    plan = fits(typed(f"plan {model} --on 2xrtx3090"), "pytorch", [0, 1])
    assert (plan.tp, plan.replicas) == (2, 1)
    # Two prompts in one forward end LMDeploy's CogVLM.
    assert plan.engines[0].settings.max_batch_size == 1
    assert any(one.startswith("max_batch_size 1: with more at once a") for one in plan.reasons)
    shards = [sum(t.bytes for t in g.terms if t.phase == "weights") for g in plan.ledgers]
    assert all(size < 24 * GIB < plan.model.weight_bytes for size in shards)


def test_5_cogvlm_in_copies_is_refused_with_the_reason(typed) -> None:
    plan = refused(typed("plan cogvlm-17b --on 2xrtx3090 --replicas 2"))
    assert (plan.tp, plan.replicas) == (1, 2)
    assert "runs out of memory while loading: GPU 0 is" in plan.verdict
    assert format_bytes(plan.model.weight_bytes) in plan.verdict
    assert plan.model.weight_bytes > plan.ledgers[0].total
    # Without the copies the same cards do; with them twice as many are needed.
    offered = [one.change for one in plan.remedies if one.effect.startswith("fits")]
    assert any("--replicas" in change or change.startswith("4 x") for change in offered)
