"""Settings of engines that differ, the largest images, and commands that a shell reads back."""

from __future__ import annotations

import shlex

import pytest

import turbofit
from turbofit.core.plan import Command, alike
from turbofit.machine.source import machine_from
from turbofit.report.painters import terminal
from turbofit.report.painters.terminal import paint
from turbofit.report.views.figures import per_engine_blocks, shell_words
from turbofit.report.views.plan_view import plan_view


@pytest.mark.parametrize("on", ["rtx3090+rtx4090+l4+a100-40g", "2xrtx3090+rtx4090"])
def test_equal_engines_share_a_column_and_eighty_columns_hold_them(on: str) -> None:
    plan = turbofit.plan("internvl2-2b", on=on, replicas=len(machine_from(on).gpus))
    text = terminal.paint(per_engine_blocks(plan))
    assert max(map(len, text.splitlines())) <= 80
    heads = [line for line in text.splitlines() if "each engine " in line]
    assert sum(line.count("GPU") for line in heads) == len(alike(plan.engines))


def test_the_shell_reads_the_command_back() -> None:
    command = Command(
        env={"A": "b c", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"},
        argv=("lmdeploy", "serve", "api_server", "/models/it's here", "--flag", "--x", "1 2", "-$"),
    )
    words = shlex.split(shell_words(command.argv, command.env).replace("\\\n", ""))
    env = [f"{name}={value}" for name, value in command.env.items()]
    assert words == [*env, *command.argv]


def test_a_prediction_names_the_largest_image_that_its_session_takes() -> None:
    plan = turbofit.predict("internvl2-8b", on="1xa100-80g", session_len=1000)
    text = " ".join(paint(plan_view(plan)).split())
    images = "1 image a request, of at most 3 tiles of 448x448 (768 tokens)"
    assert f"{images} (larger images, of up to 25, are refused)" in text
