"""Admission, balance and health, without HTTP."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import virtual_time
from tests.support.gateway import CHAT, Answer, Recorder, call, chat, gateway, stream
from tests.support.waiting import auntil
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.metrics import merge
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import UNSTATED, Cost, Gate, KvCache
from turbofit.gateway.routing.admission import Admission
from turbofit.gateway.routing.engines import Affinity, Fleet, RoutedEngine
from turbofit.gateway.routing.health import Monitor, healthy


def engines(count: int = 1, gate=10, host_limit=10**9) -> list[RoutedEngine]:
    return [
        RoutedEngine(index, f"http://e{index}", gate=Gate(gate), host_limit=host_limit)
        for index in range(count)
    ]


async def test_turns_go_round_the_clients() -> None:
    found = engines()
    door, order = Admission(Fleet(found)), []

    async def one(client: str, number: int):
        place = await door.admit(client, Cost(units=10))
        order.append(f"{client}{number}")
        await asyncio.sleep(0)
        place.leave()

    greedy = [asyncio.ensure_future(one("a", i)) for i in range(4)]
    await asyncio.sleep(0)
    await asyncio.gather(one("b", 0), one("c", 0), *greedy)
    assert order == ["a0", "a1", "a2", "b0", "c0", "a3"]
    assert (found[0].units, door.waiting) == (0, 0)


async def test_a_large_request_is_not_cache_shortfall_by_small_ones() -> None:
    found = engines()
    door, order = Admission(Fleet(found)), []

    async def one(client, units):
        place = await door.admit(client, Cost(units=units))
        order.append((client, units))
        await asyncio.sleep(0.001)
        place.leave()

    await asyncio.gather(one("s", 4), one("s", 4), one("big", 10), *(one("s", 4) for _ in range(6)))
    assert order.index(("big", 10)) <= 3


async def test_the_line_has_an_end_and_a_deadline() -> None:
    door = Admission(Fleet(engines()), longest=1, seconds=0.05)
    first = await door.admit("a", Cost(units=10))
    late = asyncio.ensure_future(door.admit("b", Cost(units=1)))
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(Refusal) as full:
            await door.admit("c", Cost(units=1))
        assert full.value.status == 429
    with pytest.raises(Refusal) as waited:
        await late
    assert (waited.value.status, door.waiting) == (429, 0)
    first.leave()
    assert (await door.admit("d", Cost(units=10))).engine.units == 10


@pytest.mark.parametrize("cost", [Cost(units=11), Cost(host_bytes=51)])
async def test_what_no_engine_could_hold_is_refused_at_once(cost) -> None:
    with pytest.raises(Refusal) as caught:
        await Admission(Fleet(engines(host_limit=50))).admit("a", cost)
    assert caught.value.status == 400


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 3), st.booleans()), max_size=40),
    st.integers(1, 3),
)
def test_no_engine_ever_holds_more_than_its_gate(requests, count) -> None:
    async def run():
        found = engines(count)
        door, most = Admission(Fleet(found), seconds=5.0), 0

        async def one(units, client, leaves):
            nonlocal most
            cost = Cost(units=units, host_bytes=units)
            place = await door.admit(str(client), cost)
            place.engine.outstanding += 1
            most = max(most, *(e.units for e in found))
            try:
                await asyncio.sleep(0.0005 * units)
            finally:
                place.engine.outstanding -= 1
                place.leave()

        tasks = [asyncio.ensure_future(one(*request)) for request in requests]
        await asyncio.sleep(0.001)
        for task, (_, _, leaves) in zip(tasks, requests, strict=True):
            if leaves:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, [(e.units, e.host_bytes, e.outstanding) for e in found], door.waiting

    most, left, waiting = virtual_time.run(run())
    assert most <= 10
    assert left == [(0, 0, 0)] * count
    assert waiting == 0


async def test_a_text_passes_images_that_wait_but_no_text_that_does() -> None:
    """The tokens that texts reserve hold up an image at the head of the line, and not for good."""
    kv = KvCache(tokens=640 + 20 * 64, longest=16 * 64, block=64)
    found = RoutedEngine(0, "http://e", gate=Gate(13, kv))
    door, order, places = Admission(Fleet([found])), [], {}

    def ask(name: str, units: int, tokens: int) -> asyncio.Task[None]:
        async def one() -> None:
            places[name] = await door.admit(name, Cost(units=units, tokens=tokens))
            order.append(name)

        return asyncio.ensure_future(one())

    async def then(*names: str) -> None:
        for name in names:
            places[name].leave()
        await virtual_time.settled()

    tasks = [ask("image", 13, 64), ask("image that waits", 13, 64), ask("text", 0, 64)]
    await virtual_time.settled()
    assert order == ["image", "text"]
    places["image"].begin()
    await virtual_time.settled()
    assert order[2:] == ["image that waits"]
    places["image that waits"].begin()
    tasks += [ask("long text", 0, UNSTATED), ask("short text", 0, 64)]
    await virtual_time.settled()
    assert order[3:] == []  # the long one could evict, and the short one stays behind it
    await then("image")
    assert order[3:] == ["long text", "short text"]
    await then("image that waits", "text", "long text", "short text")
    assert (found.units, found.gate.reserved) == (0, 0)
    await asyncio.gather(*tasks)
    assert len(order) == 5


async def test_those_who_wait_are_told_when_the_last_engine_dies() -> None:
    found = engines()
    door = Admission(Fleet(found))
    await door.admit("a", Cost(units=10))
    waiting = asyncio.ensure_future(door.admit("b", Cost(units=5)))
    await asyncio.sleep(0)
    found[0].up = False
    door.pump()
    with pytest.raises(Refusal) as caught:
        await waiting
    assert caught.value.status == 503


def test_the_least_busy_engine_is_next() -> None:
    found = engines(3)
    found[0].outstanding, found[1].outstanding, found[2].outstanding = 2, 1, 1
    found[1].gate.counted = 5
    assert Fleet(found).best(Cost()).index == 2


def conversation(*texts: str, **fields):
    return {"messages": [{"role": "user", "content": text} for text in texts], **fields}


def test_long_beginnings_stay_together_until_that_costs_too_much() -> None:
    found, memory = engines(3), Affinity()
    long = "x" * 3000
    found[0].outstanding, fleet = 1, Fleet(found)

    def chosen(*texts: str) -> RoutedEngine:
        best = fleet.best(Cost())
        assert best is not None
        return memory.chooser(conversation(*texts))(best, lambda engine: True)

    home = chosen(long)
    assert home.index == 1
    home.outstanding = 3
    again = chosen(long, "and then?")
    assert again.index == 1
    home.outstanding = 9
    assert chosen(long, "and then?").index == 2
    assert chosen("hi").index == 2


def watched(found, probe, **keywords):
    changed = []
    times = {"stall_seconds": 60.0, "retry_seconds": 0.0, "probe_seconds": 0.05, **keywords}
    upstream = SimpleNamespace(probe=probe)
    return Monitor(found, upstream, GatewayConfig(**times), lambda: changed.append(1)), changed


async def test_three_failed_probes_take_an_engine_out_and_one_success_brings_it_back() -> None:
    found, answers, states = engines(), [False, False, False, False, True], []

    async def probe(engine):
        states.append((engine.up, healthy(found)))
        return answers.pop(0)

    monitor, changed = watched(found, probe)
    monitor.start()
    await auntil(lambda: not answers, "five questions")
    await virtual_time.settled()
    await monitor.stop()
    up = found[0].up
    fine = healthy(found)
    assert [up for up, _ in states] == [True, True, True, False, False]
    assert not any(fine for _, fine in states)
    assert (up, fine, len(changed)) == (True, True, 2)


async def test_a_probe_that_never_ends_counts_as_failed() -> None:
    found = engines()

    async def probe(engine):
        await asyncio.Event().wait()
        return True

    monitor, _ = watched(found, probe)
    monitor.start()
    await auntil(lambda: not found[0].up, "the engine to be given up")
    await monitor.stop()
    assert found[0].up is False


async def test_recent_traffic_is_proof_enough() -> None:
    found, probed = engines(), []

    async def probe(engine):
        probed.append(1)
        return True

    found[0].succeeded()
    monitor, _ = watched(found, probe)
    monitor.start()
    await asyncio.sleep(59)
    before = healthy(found), len(probed)
    await asyncio.sleep(2)
    await monitor.stop()
    assert (before, len(probed)) == ((True, 0), 1)


async def test_an_engine_that_owes_answers_but_is_silent_is_given_up() -> None:
    """The port lives, nothing ever comes: what waits for it must end."""
    recorder = Recorder(lambda *_: stream(b"data: 1\n\n", 600.0))
    recorder.works = False
    app, _ = gateway(recorder=recorder, idle_seconds=1e6)
    app.engines[0].succeeded()
    await app.startup()
    streaming = asyncio.ensure_future(call(app, body=chat(stream=True)))
    await virtual_time.settled()
    recorder.answer = lambda *_: Answer(600.0)
    silent = asyncio.ensure_future(call(app, body=chat()))
    streaming, silent = await asyncio.gather(streaming, silent)
    dead = await call(app, body=chat())
    health = await call(app, "/health")
    recorder.works = True
    await auntil(lambda: app.engines[0].up, "the engine to be back")
    back = await call(app, "/health")
    await app.shutdown()
    assert streaming.status == 200
    assert b'"engine_died"' in streaming.body
    assert streaming.done
    assert (silent.status, dead.status, health.status, back.status) == (503, 503, 503, 200)
    assert dead.headers["retry-after"] == "5"


async def test_failing_answers_make_the_gateway_ask() -> None:
    """After an out-of-memory of the PyTorch engine every request is a 503 and its health is 200."""
    recorder = Recorder(lambda *_: Answer(b"{}", status=503))
    app, _ = gateway(recorder=recorder, retry_seconds=0.0)
    app.engines[0].succeeded()
    recorder.works = False
    await app.startup()
    first = await call(app, CHAT, chat())
    await auntil(lambda: not app.engines[0].up, "the engine to be given up")
    health = await call(app, "/health")
    await app.shutdown()
    assert (first.status, health.status) == (503, 503)
    assert recorder.probes >= 3


def test_pages_of_several_engines_become_one() -> None:
    page = "\n".join(
        (
            "# HELP h Seconds.", "# TYPE h histogram", 'h_bucket{le="1"} 3', "h_sum 2.5",
            "h_count 3", "# HELP g x", "# TYPE g gauge", 'g{path="a b{c}"} 1', "bare 7",
            "g2{} 4", "",
        )
    )  # fmt: skip
    lines = merge({0: page, 3: page}).splitlines()
    assert lines.count("# TYPE h histogram") == 1
    assert 'h_bucket{engine="3",le="1"} 3' in lines
    assert 'g{engine="0",path="a b{c}"} 1' in lines
    assert 'bare{engine="3"} 7' in lines
    assert 'g2{engine="0"} 4' in lines
    heads = [i for i, line in enumerate(lines) if line.startswith("h_")]
    assert heads == list(range(heads[0], heads[0] + 6))
    assert SimpleNamespace(ok=merge({})).ok == ""


def test_a_label_that_a_sample_has_is_not_given_twice() -> None:
    """LMDeploy's samples have ``engine``; Prometheus refuses a page with a label twice."""
    page = 'n_total{engine="0",model_name="m,engine=0"} 4\nn_total{x="1",engine="2"} 5\n'
    assert merge({3: page}).splitlines() == [
        'n_total{engine="3",exported_engine="0",model_name="m,engine=0"} 4',
        'n_total{engine="3",x="1",exported_engine="2"} 5',
    ]
    assert merge({"a b": 'n{engine="0"} 1\n'}, "model") == 'n{model="a b",engine="0"} 1\n'
