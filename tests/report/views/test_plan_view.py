"""A plan's short answer, its capacity, and engines that differ."""

from __future__ import annotations

import re
import shlex
from typing import Any

import msgspec
import pytest

import turbofit
from tests.report.documents import planned
from tests.support.plans import plausible_plan
from turbofit.core.messages import BEYOND, OWN_CODE, QUEUED
from turbofit.core.plan import Command, Plan
from turbofit.machine.source import machine_from
from turbofit.report.painters import terminal
from turbofit.report.painters.terminal import paint
from turbofit.report.views.figures import images_held, per_engine_blocks, shell_words, users_of
from turbofit.report.views.plan_view import plan_view

SPECS = (
    ("internvl2-8b", "4xrtx3090"),
    ("qwen2-vl-7b", "2xrtx4090"),
    ("internvl2-8b", "rtx3090+rtx4090"),
    ("llava-1.5-7b", "1xl4:free=19GiB"),
    ("qwen2.5-7b", "1xrtx3090"),
    ("internvl2-26b", "1xrtx3060"),
)


@pytest.mark.parametrize(
    ("model", "on"),
    [("qwen3.6-35b-a3b", "2xb200"),
     ("internvl2-8b", "rtx3090+rtx4090+a10+l4+rtx3060+rtx4080+v100-32g+a6000")],
)  # fmt: skip
def test_a_long_answer_leaves_the_engines_command_to_the_whole(model: str, on: str) -> None:
    plan = turbofit.plan(model, on=on)
    text = paint(plan_view(plan), short=True)
    assert 20 < len(text.splitlines()) <= 30
    text = " ".join(text.split())
    assert "(--full has its command)" in text
    assert "lmdeploy serve api_server" in paint(plan_view(plan))
    # TurboMind has no kernels of it there, and is not said to be faster.
    assert ("PyTorch engine answers images" in text) == (on == "2xb200")
    assert "may be ten times faster" not in text


def test_a_table_of_image_limits_has_no_digits_where_an_order_is_sure() -> None:
    plan = turbofit.plan("qwen3.6-35b-a3b", on="1xb200")
    assert plan.throughput.surety.word == "order"
    table = paint(plan_view(plan)).partition("What an image limit costs")[2]
    rows = [line for line in table.splitlines() if "--max-pixels " in line][: len(plan.limit_costs)]
    assert len(rows) > 1
    assert all(re.search(r" about [\d.]+ +about [\d.]+$", row) for row in rows)


@pytest.mark.parametrize(("model", "on"), SPECS)
def test_it_fits_a_terminal_and_has_the_verdict_the_promise_and_one_command(
    model: str, on: str
) -> None:
    plan = turbofit.plan(model, on=on)
    text = paint(plan_view(plan), short=True)
    assert len(text.splitlines()) <= 27
    assert plan.verdict in " ".join(text.split())
    assert f"{plan.settings.session_len:,} tokens with the answer" in text
    queued = QUEUED in plan.warnings
    assert text.count("lmdeploy serve api_server") == (1 if plan.fits and not queued else 0)
    assert text.count("LMDeploy alone") == (1 if plan.fits else 0)
    assert text.count("turbofit serve ") == (1 if plan.fits else 0)
    if plan.fits and not queued:
        places = [text.index(one) for one in ("turbofit serve", "LMDeploy alone", "api_server")]
        assert places == sorted(places)


def told(plan: Plan) -> str:
    return " ".join(paint(plan_view(plan), short=True).split())


def test_the_slower_of_host_and_cards_is_said_once() -> None:
    slow = turbofit.plan("internvl2-1b", on="1xh100,cores=1")
    assert "host 1 core prepares 12 images/s, the GPUs take 34" in told(slow)
    quick = turbofit.plan("internvl2-1b", on="1xh100,cores=16")
    assert "prepare" not in told(quick)
    assert "15 cores prepare" in paint(plan_view(quick))


def test_a_plan_that_holds_only_in_a_queue_hands_out_no_command_without_one() -> None:
    plan = turbofit.plan("qwen2-vl-7b", on="2xrtx4090")
    assert QUEUED in plan.warnings
    text = told(plan)
    assert "turbofit serve qwen2-vl-7b --images 1 --context 32768" in text
    assert "LMDeploy alone does not keep this plan" in text
    assert "api_server" not in text
    assert "api_server" in paint(plan_view(plan))
    assert not any(one.holds_limits for one in plan.commands)
    asked = turbofit.predict("qwen2-vl-7b", on="1xa100-80g", queue_images=True)
    assert "api_server" not in told(asked)


def test_what_was_assumed_of_the_machine_is_said_first_and_what_is_always_so_never() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xV100")
    assert "- assumed: v100 was read as V100 SXM2 16 GB" in told(plan)
    assert OWN_CODE in plan.warnings
    assert OWN_CODE not in told(plan)
    assert "more warning" not in told(plan)
    both = turbofit.plan("qwen2-vl-2b", on="rtx4090+rtx3080")
    assert "rtx4090 was read as the 24 GB card" in told(both)
    assert "rtx3080 was read as the 10 GB card" in told(both)
    assert any(BEYOND in text for text in both.warnings)
    assert BEYOND not in told(both)


def test_of_several_warnings_the_plans_first_is_shown_and_the_others_are_counted() -> None:
    plan = plausible_plan()
    machine = msgspec.structs.replace(plan.machine, warnings=("of the machine",))
    plan = msgspec.structs.replace(
        plan, machine=machine, warnings=("of the machine", "of the plan", "of it too")
    )
    said = told(plan)
    assert "- of the plan (and 2 more warnings)" in said
    assert "of the machine" not in said


@pytest.mark.parametrize(
    ("on", "said"),
    [("24GB", "assumed: 24GB has no preset"), ("a100-80g:mig=3g.40gb", "42 of 108 SMs")],
)
def test_what_all_figures_rest_on_is_in_the_short_text(on: str, said: str):
    text = " ".join(paint(plan_view(turbofit.plan("internvl2-2b", on=on)), short=True).split())
    assert said in text
    assert "assumed" not in paint(
        plan_view(turbofit.plan("internvl2-2b", on="1xrtx3090")), short=True
    )


@pytest.mark.parametrize(
    ("model", "options", "engine", "why"),
    [
        ("internvl3-8b", {}, "turbomind", None),
        # Each engine takes another share of what is free.
        ("internvl3-8b", {"cache_max_entry_count": 0.95}, "pytorch",
         "pytorch: with --cache-max-entry-count 0.95 turbomind does not fit: starts, then aborts on"
         " the longest prompts"),
        ("smolvlm2", {}, "transformers", "transformers: TurboMind 0.18 has no encoder for"),
    ],
)  # fmt: skip
def test_the_engine_stands_in_the_short_answer_and_why_it_is_not_the_usual_one(
    model: str, options: dict[str, Any], engine: str, why: str | None
) -> None:
    text = told(turbofit.plan(model, on="1xrtx4090", **options))
    assert f" on 1xrtx4090 with {engine} " in text
    assert (" engine " + (why or "") in text) == (why is not None)


def test_users_are_whole_blocks_of_the_cache() -> None:
    plan = planned("fits")
    assert images_held(plan) == plan.kv.tokens // (13 * 256)
    users = users_of(plan)
    first = users[0]
    assert first.tokens == 13 * 256 + 512  # a multiple of 64 already
    assert first.in_cache == plan.kv.tokens // first.tokens
    assert first.running == plan.settings.max_batch_size
    assert [row.in_cache for row in users] == sorted((row.in_cache for row in users), reverse=True)
    assert users[-1].tokens == plan.kv.longest_request_tokens


def test_what_holds_no_image_or_nothing_or_one_request() -> None:
    text_only, too_small, serial = map(planned, ("text only", "does not fit", "fallback"))
    assert images_held(text_only) is None
    assert users_of(text_only)[0].what == "512 tokens of text"
    assert (images_held(too_small), users_of(too_small)) == (0, [])
    assert images_held(serial) == 1
    assert {(row.in_cache, row.running) for row in users_of(serial)} == {(1, 1)}


def test_a_request_never_lies_in_two_caches() -> None:
    plan = planned("mixed cards")
    first = users_of(plan)[0]
    each = [plan.of_group(number).kv.tokens for number in range(2)]
    assert each[0] != each[1]
    assert first.in_cache == sum(tokens // first.tokens for tokens in each)


@pytest.mark.parametrize("on", ["rtx3090+rtx4090+l4+a100-40g", "2xrtx3090+rtx4090"])
def test_equal_engines_share_a_column_and_eighty_columns_hold_them(on: str) -> None:
    cards = len(machine_from(on).gpus)
    plan = turbofit.plan("internvl2-2b", on=on, replicas=cards)
    text = terminal.paint(per_engine_blocks(plan))
    assert max(map(len, text.splitlines())) <= 80
    heads = [line for line in text.splitlines() if "each engine " in line]
    assert sum(line.count("GPU") for line in heads) == len(plan.unlike_groups())


def test_the_shell_reads_the_command_back() -> None:
    command = Command(
        env={"A": "b c", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"},
        argv=("lmdeploy", "serve", "api_server", "/models/it's here", "--flag", "--x", "1 2", "-$"),
        group=0,
    )
    words = shlex.split(shell_words(command.argv, command.env).replace("\\\n", ""))
    env = [f"{name}={value}" for name, value in command.env.items()]
    assert words == [*env, *command.argv]


def test_a_prediction_names_the_largest_image_that_its_session_takes() -> None:
    plan = turbofit.predict("internvl2-8b", on="1xa100-80g", session_len=1000)
    text = " ".join(paint(plan_view(plan)).split())
    images = "1 a request, at most 3 tiles of 448x448 pixels each: 768 tokens"
    assert f"{images} (larger ones, up to 25, are refused)" in text
    assert f"images at once {plan.kv.tokens // 768:,} of the worst size" in text
