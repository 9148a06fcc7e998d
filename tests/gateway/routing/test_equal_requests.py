"""Equal requests of which no engine has answered one yet: they share an engine, and its end."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter

import pytest

from tests import virtual_time
from tests.gateway.routing.test_quarantine import KILLS, Fleet, code
from tests.support.gateway import DONE, EVENT, Answer, Recorder, call, chat, gateway, image_part
from tests.support.gateway import stream as streamed
from tests.virtual_time import settled
from tests.waiting import auntil
from turbofit.gateway.routing.equal_requests import EqualRequests
from turbofit.gateway.routing.upstream import Unreachable


def where(recorder: Recorder) -> list[int]:
    """The engines that got a request, in order."""
    return [index for index, _, path, _, _ in recorder.seen if path.endswith("completions")]


def hello(**facts):
    return chat({"type": "text", "text": "hello"}, **facts)


@pytest.mark.parametrize("parts", [(), (image_part(1200, 900),)])
@pytest.mark.parametrize("stream", [False, True])
def test_equal_requests_at_once_end_two_engines_however_many_there_are(parts, stream) -> None:
    async def run():
        async with Fleet(6) as fleet:
            innocent = [asyncio.ensure_future(fleet.ask(f"innocent {n}")) for n in range(12)]
            await settled()
            killing = [fleet.ask(KILLS, parts=parts, stream=stream) for _ in range(6)]
            replies = await asyncio.gather(*killing)
            again = await fleet.ask(KILLS, parts=parts, stream=stream)
            beside = await asyncio.gather(*innocent)
            return Counter(map(code, replies)), code(again), len(fleet.deaths), beside

    replies, again, deaths, beside = virtual_time.run(run())
    assert deaths == 2
    assert replies[503, "engine_died"] >= 1
    assert again == (422, "convicted")
    assert [one.status for one in beside] == [200] * 12


class EndsWithinAnswers(Fleet):
    """Its engines end a second after their first token of a killing request."""

    async def _answer(self, engine, path, body):
        if KILLS.encode() not in body:
            return await super()._answer(engine, path, body)
        gone = asyncio.get_running_loop().create_future()
        self.held[engine.index].add(gone)
        asyncio.get_running_loop().call_later(1.0, self._end, engine.index, gone)
        return streamed(0.1, EVENT, gone)

    def _end(self, index: int, gone: asyncio.Future[None]) -> None:
        if not gone.done():
            self.kill(index)
        self.held[index].discard(gone)


@pytest.mark.parametrize("pauses", [(*(0.0,) * 6, 20.0), (0.0, 0.3, 0.3, 0.3, 20.0, 0.2)])
def test_equal_streams_that_end_their_engine_within_an_answer_end_two(pauses) -> None:
    async def run():
        async with EndsWithinAnswers(6) as fleet:
            asked = []
            for pause in pauses:
                await asyncio.sleep(pause)
                asked.append(asyncio.ensure_future(fleet.ask(KILLS, stream=True)))
            await asyncio.gather(*asked)
            again = await fleet.ask(KILLS, stream=True)
            return len(fleet.deaths), code(again)

    assert virtual_time.run(run()) == (2, (422, "convicted"))


class EndsLater(Fleet):
    """Its engines answer a killing request until they are `ill`."""

    ill = False

    async def _answer(self, engine, path, body):
        return await super()._answer(engine, path, body if self.ill else b"")


def test_equal_ones_that_are_alone_together_at_a_second_death_are_convicted() -> None:
    async def run():
        async with EndsLater(2) as fleet:
            await fleet.ask(KILLS)  # they go to all engines from now on
            fleet.ill = True
            await asyncio.gather(*(fleet.ask(KILLS) for _ in range(4)))
            assert len(fleet.deaths) == 2
            await fleet.all_up()
            again = await fleet.ask(KILLS)
            return len(fleet.deaths), code(again)

    assert virtual_time.run(run()) == (2, (422, "convicted"))


def test_an_engine_that_lost_its_clients_has_not_had_the_request_for_ten_seconds() -> None:
    """Ten seconds after a client hung up at once, six equal requests went to all engines."""

    async def run():
        async with Fleet(6) as fleet:
            gone = asyncio.Event()
            gone.set()
            body = chat({"type": "text", "text": KILLS})
            await call(fleet.app, body=body, leave=gone)
            before = len(fleet.deaths)
            await asyncio.sleep(12.0)
            burst = [fleet.ask(KILLS) for _ in range(6)]
            await asyncio.gather(*burst)
            return before, len(fleet.deaths)

    assert virtual_time.run(run()) == (0, 2)


class LosingEngine(Fleet):
    """Its first engine loses what it has without a death, at `lose`."""

    def __init__(self, engines: int) -> None:
        super().__init__(engines)
        self.lost = asyncio.Event()
        self.recorder.open = self._open(self.recorder.open)
        self.unreachable = False

    def _open(self, opens):
        async def slowly(engine, *request):
            if self.unreachable and not engine.index:
                await self.lost.wait()
                raise Unreachable("nobody answers", vanished=True)
            return await opens(engine, *request)

        return slowly

    async def _answer(self, engine, path, body):
        if engine.index:
            return await super()._answer(engine, path, body)
        await self.lost.wait()
        return OSError(errno.ETIMEDOUT, "its machine vanished")

    def lose(self, how: str) -> None:
        first = self.app.engines[0]
        if how == "drained":
            first.draining = True
            first.abort_all(died=False)
        self.lost.set()


@pytest.mark.parametrize("how", ["unreachable", "vanished", "drained"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 15.0])
def test_equal_requests_that_their_engine_loses_share_the_next_one_too(
    how, stream, seconds
) -> None:
    async def run():
        async with LosingEngine(6) as fleet:
            fleet.unreachable = how == "unreachable"
            burst = [asyncio.ensure_future(fleet.ask(KILLS, stream=stream)) for _ in range(6)]
            await settled()
            assert fleet.app.engines[0].outstanding == 6
            await asyncio.sleep(seconds)
            await fleet.ask("innocent")
            fleet.lose(how)
            replies = await asyncio.gather(*burst)
            return Counter(map(code, replies)), len(fleet.deaths)

    replies, deaths = virtual_time.run(run())
    assert deaths == 2
    assert set(replies) <= {(503, "engine_died"), (422, "convicted")}


def test_they_go_to_all_engines_once_one_of_them_is_answered() -> None:
    """Not once its answer has begun: an engine may end in the middle of it."""

    async def run():
        app, recorder = gateway(
            engines=3, recorder=Recorder(lambda *_: streamed(1.0, EVENT, 5.0, DONE))
        )
        first = [asyncio.ensure_future(call(app, body=hello(stream=True))) for _ in range(3)]
        await settled()
        early = where(recorder)
        await asyncio.sleep(1.5)
        begun = asyncio.ensure_future(call(app, body=hello(stream=True)))
        await asyncio.gather(*first)
        more = [asyncio.ensure_future(call(app, body=hello(stream=True))) for _ in range(6)]
        await asyncio.gather(begun, *more)
        once_more = [call(app, body=hello(stream=True)) for _ in range(3)]
        await asyncio.gather(*once_more)
        return early, where(recorder)[3:4], where(recorder)[4:10], where(recorder)[10:]

    early, begun, more, once_more = virtual_time.run(run())
    assert early == [0, 0, 0]
    assert begun == [0]
    assert set(more) == {0, 1, 2}
    assert sorted(once_more) == [0, 1, 2]


def test_different_requests_are_not_kept_together() -> None:
    async def run():
        app, recorder = gateway(engines=3, recorder=Recorder(lambda *_: streamed(1.0, EVENT, DONE)))
        bodies = [chat({"type": "text", "text": f"hello {n}"}) for n in range(3)]
        await asyncio.gather(*(call(app, body=body) for body in bodies))
        return where(recorder)

    assert sorted(virtual_time.run(run())) == [0, 1, 2]


def test_who_hangs_up_and_asks_again_gets_the_same_engine_for_ten_seconds() -> None:
    """Else a person who presses a button again and again gives it to each engine."""

    async def run():
        app, recorder = gateway(engines=4, recorder=Recorder(lambda *_: streamed(60.0, DONE)))
        for _ in range(4):
            gone = asyncio.Event()
            pending = asyncio.ensure_future(call(app, body=hello(), leave=gone))
            await asyncio.sleep(3.0)
            app.engines[where(recorder)[0]].outstanding = 3  # it has others, too
            gone.set()
            await asyncio.gather(pending, return_exceptions=True)
        last = asyncio.ensure_future(call(app, body=hello()))
        await settled()
        last.cancel()
        return where(recorder)

    first, *others, last = virtual_time.run(run())
    assert others == [first] * 3
    assert last != first


BIG = chat(image_part(1200, 900))


async def one_and_more(seconds: float):
    """A request at one of three engines with room for one each; two equal ones wait."""
    app, recorder = gateway(engines=3, recorder=Recorder(lambda *_: Answer(seconds, b"{}")))
    calls = [asyncio.ensure_future(call(app, body=BIG))]
    await auntil(lambda: recorder.seen, "it to be sent")
    room = sum(engine.host_bytes for engine in app.engines)
    for engine in app.engines:
        engine.host_limit = room
    calls += [asyncio.ensure_future(call(app, body=BIG)) for _ in range(2)]
    await auntil(lambda: app.admission.waiting == 2, "two to wait for room")
    return app, recorder, calls


@pytest.mark.parametrize(("seconds", "expected"), [(3.0, 3.0), (25.0, 10.0)])
def test_where_the_engine_has_no_room_they_wait_for_an_answer_or_ten_seconds(
    seconds, expected
) -> None:
    async def run():
        loop = asyncio.get_running_loop()
        begin, times = loop.time(), []
        app, recorder, calls = await one_and_more(seconds)
        for number in (2, 3):
            await auntil(lambda number=number: len(recorder.seen) >= number, "the next to be sent")
            times.append(loop.time() - begin)
        for one in calls:
            one.cancel()
        return times, app.admission.waiting

    times, waiting = virtual_time.run(run())
    assert times == pytest.approx([expected] * 2, abs=0.2)
    assert waiting == 0


def test_those_who_wait_hold_up_no_client() -> None:
    async def run():
        app, recorder, equal = await one_and_more(3.0)
        waiting = app.admission.waiting
        other = asyncio.ensure_future(call(app, body=chat(image_part(1200, 896))))
        await auntil(lambda: len(recorder.seen) == 2, "another one to be sent")
        found = where(recorder), waiting, app.admission.waiting
        await asyncio.gather(*equal, other)
        return found

    assert virtual_time.run(run()) == ([0, 1], 2, 2)


def test_an_engine_that_is_taken_out_is_kept_for_nobody() -> None:
    async def run():
        equal = EqualRequests(asyncio.get_running_loop().time, lambda: None)
        app, _ = gateway(engines=2)
        one, other = app.engines
        choose = equal.chooser("a sketch", None)
        assert choose is not None
        assert choose(one, lambda _: True) is one
        assert choose(other, lambda _: True) is one
        assert choose(other, lambda engine: engine is other) is None
        app.fleet.set((other,))
        assert choose(other, lambda _: True) is other

    virtual_time.run(run())
