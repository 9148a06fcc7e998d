from __future__ import annotations

import threading

import click

from tests.load.scripted import ScriptedServer
from tests.waiting import HANG
from turbofit.cli.command_group import TURBOFIT
from turbofit.cli.options.fields import filled
from turbofit.launch.tune.load_child import LoadChild
from turbofit.load.spec import LoadSpec

FEW = LoadSpec.of(images=0, requests=4, concurrency=2)


def test_the_words_are_understood_as_the_same_load() -> None:
    spec = LoadSpec.of(
        images=2, image_size=((64, 32), (8, 8)), prompt_spread=0.5, stop_early=True, rate=2.5,
        evenly=True, seconds=3.0, warm_up=0, seed=7,
    )  # fmt: skip
    command = TURBOFIT.get_command(click.Context(TURBOFIT), "bench")
    assert command is not None
    with command.make_context("bench", ["http://x", *spec.option_arguments()]) as ctx:
        assert filled(LoadSpec, ctx.params) == spec


def test_it_measures() -> None:
    with ScriptedServer(key="k") as server:
        child = LoadChild(server.url, "k", FEW)
        child.wait()
    assert child.result is not None
    assert child.result.answered == 4


def test_why_it_measured_nothing_is_known() -> None:
    with ScriptedServer(key="other") as server:
        child = LoadChild(server.url, "k", FEW)
        child.wait()
    assert child.result is None
    assert "does not know the key" in child.why


def test_one_that_is_under_way_is_ended() -> None:
    with ScriptedServer("ok", "ok", "stall", "stall") as server:
        child = LoadChild(server.url, "", FEW)
        waits = threading.Thread(target=child.wait)
        waits.start()
        assert server.stalled.wait(HANG)
        child.end()
        waits.join(HANG)
        assert not waits.is_alive()
