"""Requests that engines die of, and the innocent ones beside them."""

from __future__ import annotations

import pytest

from tests.gateway.routing.dying_engines import POISON, DyingEngines, metric, vanish
from tests.support.gateway import (
    DONE,
    EVENT,
    Answer,
    Recorder,
    ask,
    call,
    chat,
    gateway,
    image_part,
    stream,
)
from turbofit.gateway.routing.engines import RoutedEngine


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("engines", [1, 2, 8])
async def test_what_an_engine_had_when_it_died_is_sent_to_no_other(engines, loops) -> None:
    mortal = DyingEngines(engines, loops=loops)
    crowd = await mortal.crowd(3 * engines)
    poisonous = mortal.send(POISON)
    await mortal.died()
    mortal.release()
    (reply,) = await mortal.settled(poisonous)
    beside = await mortal.settled(*crowd)
    after = await mortal.settled(mortal.send("innocent after it")) if engines > 1 else []
    assert (reply.status, reply.json["error"]["code"]) == (503, "engine_died")
    assert "retry-after" in reply.headers
    assert (len(mortal.dead), len(mortal.times(POISON))) == (1, 1)
    assert [one.status for one in after] == [200] * len(after)
    for number, one in enumerate(beside):
        there = set(mortal.times(f"innocent {number}"))
        assert one.status == (503 if there <= mortal.dead else 200)
        assert len(mortal.times(f"innocent {number}")) == 1
    assert [one.status for one in beside].count(503) == 3
    assert metric(await call(mortal.app, "/metrics"), "retried_total") == 0
    left = [(e.outstanding, e.units, e.host_bytes) for e in mortal.app.engines]
    assert left == [(0, 0, 0)] * engines
    assert mortal.app._bodies.in_memory == 0


@pytest.mark.parametrize(
    "first",
    [
        vanish, lambda: stream(vanish()), lambda: stream(EVENT[:9], vanish()),
        lambda: Answer(b'{"half', vanish()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("body", [chat(image_part(), stream=True), chat(image_part(), n=2)])
def test_who_loses_a_machine_is_sent_again_to_the_last_engine_too(first, body) -> None:
    recorder = Recorder(lambda engine, *_: first() if engine.index == 0 else stream(EVENT, DONE))
    app, _ = gateway(engines=2, recorder=recorder)
    reply = ask(app, body=body)
    assert (reply.status, reply.body) == (200, EVENT + DONE)
    assert [seen[0] for seen in recorder.seen] == [0, 1]
    assert recorder.bodies[0] == recorder.bodies[1]
    text = ask(app, "/metrics").body.decode()
    assert "turbofit_gateway_retried_total 1\n" in text
    assert 'turbofit_gateway_engine_failures_total{engine="0"} 1\n' in text
    left = [(e.units, e.host_bytes, e.outstanding) for e in app.engines]
    assert left == [(0, 0, 0)] * 2
    assert app._bodies.in_memory == 0


def test_who_meets_a_connection_that_a_dead_engine_kept_is_at_the_same_death() -> None:
    """It was sent just after the death; what dies seconds later is another process."""
    engine = RoutedEngine(0, "http://127.0.0.1:9000")
    death = engine.note_death()
    assert engine.note_death(engine.died_at + 0.01) is death
    assert engine.note_death(engine.died_at + 5) is not death
