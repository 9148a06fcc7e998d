from __future__ import annotations

from tests.load.scripted import ScriptedServer
from tests.support.waiting import HANG, until
from turbofit.core.process.progress import listened
from turbofit.launch.tune.load_child import LoadChild
from turbofit.load.spec import LoadSpec
from turbofit.observe.tuned import plain

FEW = LoadSpec.of(images=0, requests=4, concurrency=2)


def test_every_option_of_a_load_reaches_it() -> None:
    spec = LoadSpec.of(
        images=2, image_size=((64, 32), (8, 8)), prompt_spread=0.5, stop_early=True, rate=50.0,
        evenly=True, requests=2, warm_up=0, seed=7,
    )  # fmt: skip
    with ScriptedServer(key="k") as server:
        child = LoadChild(server.url, "k", spec)
        until(child.look, "the load ends")
    assert child.result is not None
    assert plain(child.result.load) == plain(spec.given())


def test_it_measures() -> None:
    told: list[str] = []
    with ScriptedServer(key="k") as server, listened(lambda step: told.append(str(step))):
        child = LoadChild(server.url, "k", FEW)
        until(child.look, "the load ends")
    assert child.result is not None
    assert child.result.answered == 4
    assert any("warm-up of the load" in one for one in told)


def test_why_it_measured_nothing_is_known() -> None:
    with ScriptedServer(key="other") as server:
        child = LoadChild(server.url, "k", FEW)
        until(child.look, "the load ends")
    assert child.result is None
    assert "does not know the key" in child.why


def test_one_that_is_under_way_is_ended() -> None:
    with ScriptedServer("ok", "ok", "stall", "stall") as server:
        child = LoadChild(server.url, "", FEW)
        assert server.stalled.wait(HANG)
        assert not child.look()
        child.end()


def test_one_that_is_interrupted_tells_what_it_has_measured() -> None:
    load = LoadSpec.of(images=0, requests=9, concurrency=1, warm_up=0)
    with ScriptedServer("ok", "ok", "ok", "ok", "stall") as server:
        child = LoadChild(server.url, "", load)
        assert server.stalled.wait(HANG)
        assert child.interrupt()
        until(child.look, "the load ends")
    assert not child.interrupt()
    assert child.result is not None
    assert (child.result.answered, child.result.stopped) == (4, "SIGINT")


def test_a_load_that_breaks_says_its_last_words() -> None:
    child = LoadChild("http://x", "", FEW)
    child._process.kill()
    until(child.look, "the load ends")
    assert child.result is None
    assert child.why == "the load ended with -9"
