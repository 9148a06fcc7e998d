"""Gateways whose engines come, go and change."""

from __future__ import annotations

import asyncio
import json

import pytest
from msgspec.structs import replace

from tests import virtual_time
from tests.support.gateway import (
    CHAT,
    DONE,
    EVENT,
    Answer,
    Recorder,
    call,
    chat,
    image_part,
    plan_for,
    stream,
)
from tests.virtual_time import settled
from turbofit.core.errors import UsageError
from turbofit.gateway.config import GatewayConfig, host_of_one
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.limits.cost import Cost
from turbofit.gateway.limits.gate import KvCache
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.fleet_updater import check_gateways
from turbofit.gateway.routing.routing_table import Member, RoutingTable
from turbofit.gateway.server import make_routing_table_gateway

BOUNDS = bounds_of(plan_for())
ROOM = 1 << 40


def member(name: str, **changes) -> Member:
    facts = {"url": f"http://{name}.invalid:1", "host_bytes": ROOM, **changes}
    return Member(name=name, **facts)


def routing_table(
    number: int, *members: Member | str, bounds=BOUNDS, gateways: int = 1
) -> RoutingTable:
    found = tuple(member(one) if isinstance(one, str) else one for one in members)
    return RoutingTable(number=number, bounds=bounds, members=found, gateways=gateways)


def following(first: RoutingTable, recorder=None, log=None, **config) -> tuple[Gateway, Recorder]:
    recorder = recorder or Recorder()
    app = Gateway(first.bounds, (), GatewayConfig(**config), log, None, recorder)
    app.follow(first)
    return app, recorder


def by_name(app: Gateway) -> dict:
    return {engine.name: engine for engine in app.engines}


def test_the_same_name_stays_the_same_engine() -> None:
    app, _ = following(routing_table(1, "a", "b"))
    a, b = app.engines
    app.follow(routing_table(2, "c", "b"))
    assert [engine.name for engine in app.engines] == ["c", "b"]
    assert by_name(app)["b"] is b
    app.follow(routing_table(3, "a", "b"))
    assert by_name(app)["a"] is not a
    assert len({engine.index for engine in (a, *app.engines)}) == 3


def test_an_older_or_equal_routing_table_changes_nothing() -> None:
    app, _ = following(routing_table(5, "a"))
    for number in (5, 4):
        app.follow(routing_table(number, "b", bounds=replace(BOUNDS, longest_request_tokens=1)))
        assert (list(app.health()), app.bounds) == (["a"], BOUNDS)


def test_everything_of_a_member_takes_effect() -> None:
    kv = KvCache(tokens=4 << 20, longest=1024, block=64)
    app, _ = following(routing_table(1, member("a", gate=7, kv=kv, key="k")))
    (a,) = app.engines
    assert a.gate is not None
    assert (a.gate.units, a.gate.kv, a.host_limit, a.key, a.share) == (7, kv, ROOM, "k", 1.0)
    changed = replace(
        member("a", gate=9, host_bytes=64, key="l", share=3.0, url="http://x/"), kv=kv
    )
    app.follow(routing_table(2, replace(changed, draining=True), gateways=4))
    assert (a.gate.units, a.host_limit, a.key, a.share) == (2, 16, "l", 3.0)
    assert a.gate.kv == replace(kv, tokens=1 << 20, strict=True)
    assert (a.url, a.draining, a.takes) == ("http://x", True, False)


def test_a_draining_engine_ends_what_it_has_and_gets_nothing_new() -> None:
    async def run():
        app, recorder = following(
            routing_table(1, "a"), Recorder(lambda *_: stream(EVENT, 0.1, EVENT, DONE))
        )
        first = asyncio.ensure_future(call(app, body=chat(stream=True)))
        await settled()
        app.follow(routing_table(2, member("a", draining=True), "b"))
        during = app.outstanding()
        second = await call(app, body=chat(stream=True))
        reply = await first
        app.follow(routing_table(3, member("a", draining=True)))
        none = await call(app, body=chat())
        return during, app.outstanding(), [seen[0] for seen in recorder.seen], reply, second, none

    during, after, seen, reply, second, none = virtual_time.run(run())
    assert during == {"a": 1, "b": 0}
    assert after == {"a": 0}
    assert seen == [0, 1]
    assert reply.body == second.body == EVENT * 2 + DONE
    assert (none.status, none.headers["retry-after"]) == (503, "5")


def test_an_engine_alone_has_none_to_retry_at() -> None:
    async def run():
        def answer(engine, *_):
            return stream(5.0, EVENT) if engine.name == "a" else stream(EVENT, DONE)

        app, _ = following(routing_table(1, "a"), Recorder(answer))
        waiting = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
        await settled()
        app.follow(routing_table(2, "b"))
        reply = await asyncio.wait_for(waiting, 2)
        text = (await call(app, "/metrics")).body.decode()
        return app, reply, text

    app, reply, text = virtual_time.run(run())
    # Its body was forgotten once it was sent, as on every server of one engine.
    assert reply.status == 503
    assert reply.json["error"]["code"] == "engine_died"
    assert "turbofit_gateway_retried_total 1" not in text
    assert app.outstanding() == {"b": 0}
    assert app._bodies.in_memory == 0


def test_where_another_engine_was_there_it_is_asked_instead() -> None:
    async def run():
        def answer(engine, *_):
            return stream(5.0, EVENT) if engine.name == "a" else stream(EVENT, DONE)

        records = []
        app, recorder = following(routing_table(1, "a", "b"), Recorder(answer), records.append)
        body = chat(image_part(), stream=True)
        waiting = asyncio.ensure_future(call(app, body=body))
        await settled()
        held = app._bodies.in_memory
        app.follow(routing_table(2, "b"))
        reply = await asyncio.wait_for(waiting, 2)
        text = (await call(app, "/metrics")).body.decode()
        return app, recorder, reply, text, held, records[0]

    app, recorder, reply, text, held, record = virtual_time.run(run())
    assert (reply.status, reply.body) == (200, EVENT + DONE)
    assert recorder.bodies[0] == recorder.bodies[1]
    assert "turbofit_gateway_retried_total 1" in text
    assert 'turbofit_gateway_engine_up{engine="b"} 1' in text
    assert held > 0
    assert (app._bodies.in_memory, app.engines[0].units, app.engines[0].host_bytes) == (0, 0, 0)
    assert (record["engine"], record["status"]) == ("b", 200)


def test_a_stream_that_had_begun_ends_with_an_event() -> None:
    async def run():
        app, _ = following(routing_table(1, "a", "b"), Recorder(lambda *_: stream(EVENT, 5.0)))
        begun_ = asyncio.ensure_future(call(app, body=chat(stream=True)))
        await settled()
        app.follow(routing_table(2, "b"))
        return await asyncio.wait_for(begun_, 2)

    reply = virtual_time.run(run())
    assert reply.status == 200
    assert b'"engine_died"' in reply.body


def test_an_engine_at_another_address_is_another_process() -> None:
    async def run():
        app, _ = following(routing_table(1, "a", "b"), Recorder(lambda *_: stream(5.0, EVENT)))
        a = app.engines[0]
        a.up, a.failures, a.model = False, 3, "m"
        app.follow(routing_table(2, member("a", url="http://elsewhere"), "b"))
        return a.up, a.failures, a.model, a.url, a.suspect

    assert virtual_time.run(run()) == (True, 0, None, "http://elsewhere", True)


def test_who_waits_gets_a_place_when_a_member_joins() -> None:
    async def run():
        app, recorder = following(
            routing_table(1, member("a", gate=13)), Recorder(lambda *_: Answer(0.3, b"{}"))
        )
        body = chat(image_part(1792, 1344))
        calls = [asyncio.ensure_future(call(app, body=body)) for _ in range(2)]
        await settled()
        assert (len(recorder.seen), app.admission.waiting) == (1, 1)
        app.follow(routing_table(2, member("a", gate=13), member("b", gate=13)))
        await settled()
        seen = [one[0] for one in recorder.seen]
        return seen, [reply.status for reply in await asyncio.gather(*calls)]

    assert virtual_time.run(run()) == ([0, 1], [200, 200])


def test_who_waits_for_engines_that_go_is_told() -> None:
    async def run(next_: RoutingTable):
        app, _ = following(
            routing_table(1, member("a", gate=13)), Recorder(lambda *_: Answer(0.3, b"{}"))
        )
        body = chat(image_part(1792, 1344))
        first = asyncio.ensure_future(call(app, body=body))
        await settled()
        second = asyncio.ensure_future(call(app, body=body))
        await settled()
        app.follow(next_)
        return (await second).status, (await first).status

    assert virtual_time.run(run(routing_table(2, member("a", gate=13, draining=True)))) == (
        503,
        200,
    )
    assert virtual_time.run(run(routing_table(2, member("a", gate=12)))) == (400, 200)


def test_without_members_it_says_so_and_begins_with_the_first() -> None:
    async def run():
        app, _ = following(routing_table(1))
        health, asked = await call(app, "/health"), await call(app, body=chat())
        app.follow(routing_table(2, "a"))
        served = await call(app, body=chat())
        return health, asked, served, await call(app, "/health")

    health, asked, served, after = virtual_time.run(run())
    assert (health.status, health.headers["retry-after"]) == (503, "5")
    assert health.json == {"status": "unavailable", "engines": 0, "up": 0}
    assert (asked.status, asked.headers["retry-after"]) == (503, "5")
    assert asked.json["error"]["code"] == "engine_unavailable"
    assert served.status == 200
    assert (after.status, after.json["engines"]) == (200, 1)


def test_a_request_is_held_to_one_plan_from_its_beginning_to_its_end() -> None:
    async def run():
        app, recorder = following(routing_table(1, "a"))
        text_only = bounds_of(plan_for(images=1, limit=1))
        given, sent = asyncio.Event(), []

        async def receive():
            if sent:
                await asyncio.Event().wait()
            sent.append(1)
            await given.wait()
            body = json.dumps(chat(image_part(1792, 1344, detail="high"), image_part())).encode()
            return {"type": "http.request", "body": body, "more_body": False}

        status = []

        async def send(message):
            status.append(message.get("status"))

        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
            "headers": [(b"content-type", b"application/json")], "client": ("::1", 1),
        }  # fmt: skip
        early = asyncio.ensure_future(app(scope, receive, send))
        await settled()
        app.follow(routing_table(2, "a", bounds=text_only))
        given.set()
        await early
        late = await call(app, body=chat(image_part(), image_part()))
        return status[0], recorder.bodies[0], late

    status, body, late = virtual_time.run(run())
    assert status == 200
    assert body["messages"][0]["content"][1]["image_url"]["max_dynamic_patch"] == 12
    assert (late.status, late.json["error"]["code"]) == (400, "too_many_images")


def test_a_request_goes_to_no_engine_that_was_planned_for_less() -> None:
    """It was let through by bounds that were in force before the engine was there."""
    less = replace(BOUNDS, longest_request_tokens=BOUNDS.longest_request_tokens // 2)

    async def run(bounds):
        def answer(engine, *_):
            return stream(5.0, EVENT) if engine.name == "a" else stream(EVENT, DONE)

        slow = member("c", share=0.1)
        app, recorder = following(routing_table(1, "a", slow), Recorder(answer))
        waiting = asyncio.ensure_future(call(app, body=chat(stream=True)))
        await settled()
        app.follow(routing_table(2, slow, "b", bounds=bounds))
        reply = await asyncio.wait_for(waiting, 2)
        await call(app, body=chat(stream=True))
        app.follow(routing_table(3, slow, "b", bounds=BOUNDS))
        await call(app, body=chat(stream=True))
        assert reply.status == 200
        assert not any(engine.units or engine.host_bytes for engine in app.engines)
        return [seen[0] for seen in recorder.seen]

    # By index: a is 0, c is 1, b is 2 and the least busy.
    assert virtual_time.run(run(BOUNDS)) == [0, 2, 2, 2]
    assert virtual_time.run(run(less)) == [0, 1, 2, 2]


@pytest.mark.parametrize("to_end", [False, True])
def test_an_engine_of_its_own_plan_may_hold_units_to_the_end(to_end: bool) -> None:
    """One that was planned again after a lack of memory may evict, whatever the others do."""

    async def run():
        kv = KvCache(tokens=0 if to_end else 1 << 20, longest=1024, block=64)
        app, _ = following(
            routing_table(1, member("a", gate=13, kv=kv)),
            Recorder(lambda *_: stream(EVENT, 0.3, DONE)),
        )
        waiting = asyncio.ensure_future(call(app, body=chat(image_part(), stream=True)))
        await settled()
        (engine,) = app.engines
        during = engine.units
        await waiting
        return during, engine.units

    during, after = virtual_time.run(run())
    assert (during > 0) == to_end
    assert after == 0


def test_gateways_share_the_gate_as_far_as_one_request_leaves_room() -> None:
    units, host = BOUNDS.limits.units_per_request, host_of_one(BOUNDS)
    assert units == 26
    three = member("a", gate=3 * units + 5, host_bytes=9 * host)
    check_gateways(routing_table(1, three, gateways=3))
    with pytest.raises(UsageError) as caught:
        check_gateways(routing_table(1, member("b", host_bytes=9 * host), three, gateways=4))
    assert "engine a" in caught.value.message
    assert caught.value.hint == "at most 3 gateways can share it"
    with pytest.raises(UsageError, match="host memory"):
        check_gateways(routing_table(1, member("a", host_bytes=2 * host), gateways=3))
    with pytest.raises(UsageError):
        check_gateways(routing_table(1, gateways=0))
    check_gateways(routing_table(1, replace(three, draining=True), gateways=9))
    check_gateways(routing_table(1, three, bounds=replace(BOUNDS, rule=None), gateways=9))
    with pytest.raises(UsageError):
        make_routing_table_gateway(routing_table(1, three, gateways=4), GatewayConfig())


def test_a_cluster_s_gateway_is_made_of_a_routing_table() -> None:
    app = make_routing_table_gateway(
        routing_table(1, member("a", key="k", gate=52), gateways=2),
        GatewayConfig(upstream_key="other", host_bytes=1, shares=(1.0, 2.0), prefix_affinity=True),
    )
    (a,) = app.engines
    assert a.gate is not None
    assert (a.key, a.gate.units, a.host_limit, a.label) == ("k", 26, ROOM // 2, "a")
    assert app.health() == {"a": True}


def test_several_gateways_do_not_all_begin_with_the_same_engine() -> None:
    names = [f"e{number}" for number in range(50)]

    def first(gateways: int) -> set[str]:
        found = [following(routing_table(1, *names, gateways=gateways))[0].fleet for _ in range(8)]
        return {fleet.best(Cost()).name for fleet in found}

    assert first(1) == {"e0"}
    assert len(first(8)) > 1
