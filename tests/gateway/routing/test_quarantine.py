"""Requests that engines die of, through the whole gateway: refused, kept, pardoned, paid for."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests import virtual_time
from tests.support.gateway import DONE, EVENT, Answer, Recorder, call, chat, gateway, image_part
from tests.support.gateway import stream as streamed
from tests.virtual_time import settled
from tests.waiting import auntil
from turbofit.gateway.quarantine import quarantine_file
from turbofit.gateway.quarantine.accounts import BUDGET
from turbofit.gateway.quarantine.fingerprints import Fingerprints
from turbofit.gateway.quarantine.identity import Departure, RequestIdentity
from turbofit.gateway.quarantine.quarantine_file import pardon
from turbofit.gateway.quarantine.quarantined import Accused, EngineDeath
from turbofit.gateway.routing import quarantine

KILLS = "kills"
#: What the wall's clock shows when the other one shows 0.
SINCE = [1e9]


@pytest.fixture(autouse=True)
def wall(tmp_path, monkeypatch) -> None:
    """The clock of what is kept goes with virtual time."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for module in (quarantine, quarantine_file):
        monkeypatch.setattr(module, "kept_time", lambda: SINCE[0] + time.monotonic())


class Fleet:
    """Engines of which each dies at a killing request, and is started again after a while."""

    def __init__(self, engines: int, restart: float = 20.0, **config) -> None:
        self.deaths: list[str] = []
        self.restart, self.held = restart, {index: set() for index in range(engines)}
        self.app, self.recorder = gateway(
            engines=engines, recorder=Recorder(self._answer), retry_seconds=0.5, **config
        )
        for engine in self.app.engines:
            engine.succeeded()

    async def _answer(self, engine, path, body):
        gone = asyncio.get_running_loop().create_future()
        self.held[engine.index].add(gone)
        try:
            if KILLS.encode() in body:
                await asyncio.sleep(0.05)
                if not gone.done():
                    self.kill(engine.index, body.decode())
            await asyncio.wait((gone,), timeout=0.5)
        finally:
            self.held[engine.index].discard(gone)
        if gone.done():
            return OSError("reset")
        return streamed(EVENT, 0.5, DONE) if b'"stream":true' in body else Answer(b"{}")

    def kill(self, index: int, why: str = "") -> None:
        self.deaths.append(why)
        self.recorder.down.add(index)
        for gone in self.held[index]:
            if not gone.done():
                gone.set_result(None)
        loop = asyncio.get_running_loop()
        loop.call_later(self.restart, self.recorder.down.discard, index)

    async def ask(self, text: str, key: str = "", **facts):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        parts = facts.pop("parts", ())
        body = chat({"type": "text", "text": text}, *parts, **facts)
        return await call(self.app, body=body, headers=headers)

    async def __aenter__(self):
        await self.app.startup()
        return self

    async def __aexit__(self, *_):
        await self.app.shutdown()

    async def all_up(self) -> None:
        await auntil(lambda: all(one.serves for one in self.app.engines), "all engines to serve")


def code(reply) -> tuple[int, str]:
    return reply.status, reply.json["error"]["code"]


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize("parts", [(), (image_part(1200, 900),)])
def test_the_second_death_convicts_and_the_third_attempt_is_refused(engines, parts) -> None:
    async def run():
        async with Fleet(engines) as fleet:
            replies = []
            for _ in range(3):
                await fleet.all_up()
                replies.append(await fleet.ask(KILLS, parts=parts))
            other = await fleet.ask("another", parts=parts)
            metrics = (await call(fleet.app, "/metrics")).body.decode()
            return replies, fleet.deaths, other, metrics

    replies, deaths, other, metrics = virtual_time.run(run())
    assert [code(reply) for reply in replies] == [
        (503, "engine_died"), (503, "engine_died"), (422, "convicted"),
    ]  # fmt: skip
    assert len(deaths) == 2
    message = replies[2].json["error"]["message"]
    assert "2 inference engines ended" in message
    assert "turbofit watch --forget " in message
    assert "retry-after" not in replies[2].headers
    assert other.status == 200
    assert "turbofit_gateway_convicted 1\n" in metrics
    assert "turbofit_gateway_suspects 0\n" in metrics
    assert "turbofit_gateway_convicted_total 1\n" in metrics
    assert 'turbofit_gateway_engine_deaths_total{engine="0"} ' in metrics


def test_equal_requests_that_wait_together_end_one_more_engine() -> None:
    async def run():
        async with Fleet(4) as fleet:
            first = await fleet.ask(KILLS)
            replies = await asyncio.gather(fleet.ask(KILLS), fleet.ask(KILLS), fleet.ask(KILLS))
            return [code(reply) for reply in (first, *replies)], len(fleet.deaths)

    replies, deaths = virtual_time.run(run())
    expected = [*[(503, "engine_died")] * 2, *[(422, "convicted")] * 2]
    assert (replies, deaths) == (expected, 2)


def test_an_innocent_one_beside_a_death_is_answered_once_alone_and_is_free_then() -> None:
    async def run():
        async with Fleet(3) as fleet:
            pending = [asyncio.ensure_future(fleet.ask(f"innocent {n}")) for n in range(6)]
            await asyncio.sleep(0.1)
            fleet.kill(0)
            replies = await asyncio.gather(*pending)
            return [one.status for one in replies], fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == ([200] * 6, (0, 0))


def test_a_conviction_outlives_the_gateway_and_a_pardon_ends_it(tmp_path) -> None:
    file = str(tmp_path / "turbofit" / "quarantine" / "one.json")

    async def convict():
        async with Fleet(1, quarantine=file) as fleet:
            for _ in range(2):
                await fleet.all_up()
                reply = await fleet.ask(KILLS)
            return reply

    async def again():
        async with Fleet(1, quarantine=file) as fleet:
            refused = await fleet.ask(KILLS)
            fingerprint = refused.json["error"]["message"].split("--forget ")[1].rstrip("`")
            found = await asyncio.get_running_loop().run_in_executor(None, pardon, fingerprint)
            return refused, found, await fleet.ask(KILLS), fleet.deaths

    (tmp_path / "turbofit" / "quarantine").mkdir(parents=True)
    assert virtual_time.run(convict()).status == 503
    assert KILLS.encode() not in (tmp_path / "turbofit" / "quarantine" / "one.json").read_bytes()
    SINCE[0] += 3600  # the clock of the next loop begins anew
    refused, found, pardoned, deaths = virtual_time.run(again())
    assert (code(refused), found) == ((422, "convicted"), 1)
    # It runs, and kills again: a first death after the pardon.
    assert (code(pardoned), len(deaths)) == ((503, "engine_died"), 1)


async def convicted_without_a_disk(fleet: Fleet) -> None:
    """A conviction that its file's disk does not take."""
    for _ in range(2):
        await fleet.all_up()
        await fleet.ask(KILLS)
    await auntil(lambda: fleet.app.quarantine._file.unwritten, "a write to fail")


@pytest.mark.parametrize("open_again", [True, False])
def test_a_conviction_that_a_full_disk_refused_is_written_later(tmp_path, open_again) -> None:
    """While the gateway serves, or at its end."""
    folder = tmp_path / "later"
    file = folder / "one.json"

    async def convict():
        async with Fleet(1, quarantine=str(file)) as fleet:
            await convicted_without_a_disk(fleet)
            folder.mkdir()
            if open_again:
                await auntil(file.exists, "it to be written")
                assert not fleet.app.quarantine._file.unwritten

    async def again():
        async with Fleet(1, quarantine=str(file)) as fleet:
            return await fleet.ask(KILLS)

    virtual_time.run(convict())
    SINCE[0] += 3600
    assert code(virtual_time.run(again())) == (422, "convicted")


def test_the_next_gateway_takes_over_what_a_full_disk_refused(tmp_path) -> None:
    """Another plan of the same run: its gateway keeps the same file."""
    file = tmp_path / "later" / "one.json"

    async def run():
        async with Fleet(1, quarantine=str(file)) as fleet:
            await convicted_without_a_disk(fleet)
        other = Fleet(1, quarantine=str(tmp_path / "later" / "other.json"))
        other.app.quarantine.take_over(fleet.app.quarantine)
        again = Fleet(1, quarantine=str(file))
        again.app.quarantine.take_over(fleet.app.quarantine)
        file.parent.mkdir()
        async with again:
            reply = await again.ask(KILLS)
            await auntil(file.exists, "it to be written")
        return code(reply), other.app.quarantine.suspects.number

    assert virtual_time.run(run()) == ((422, "convicted"), (0, 0))


def test_who_costs_too_many_engines_is_refused_before_its_body_is_read() -> None:
    async def run():
        async with Fleet(3, api_keys=("good", "bad")) as fleet:
            replies = []
            for number in range(BUDGET + 1):
                await fleet.all_up()
                replies.append(await fleet.ask(f"{KILLS} {number}", "bad"))
            # It sends nothing of a body.
            late = await call(
                fleet.app, raw=b"{", headers={"authorization": "Bearer bad"}, method="POST"
            )
            fine = await fleet.ask("good", "good")
            metrics = await call(fleet.app, "/metrics", headers={"authorization": "Bearer good"})
            return replies, late, fine, len(fleet.deaths), metrics.body.decode()

    replies, late, fine, deaths, metrics = virtual_time.run(run())
    assert deaths == BUDGET
    assert [reply.status for reply in replies] == [503] * BUDGET + [429]
    assert code(late) == (429, "too_many_deaths")
    assert 3000 < int(late.headers["retry-after"]) <= 3600
    assert fine.status == 200
    assert "turbofit_gateway_clients_refused 2\n" in metrics.replace("_refused 1", "_refused 2")


def test_a_client_is_pardoned_too(tmp_path) -> None:
    async def run():
        async with Fleet(2, quarantine=str(tmp_path / "turbofit/quarantine/one.json")) as fleet:
            for number in range(BUDGET):
                await fleet.all_up()
                await fleet.ask(f"{KILLS} {number}")
            await fleet.all_up()
            refused = await fleet.ask("innocent")
            await fleet.app.quarantine.close()
            SINCE[0] += 1
            name = refused.json["error"]["message"].split("--forget '")[1].rstrip("'`")
            found = await asyncio.get_running_loop().run_in_executor(None, pardon, name)
            return refused.status, name, found, (await fleet.ask("innocent")).status

    (tmp_path / "turbofit" / "quarantine").mkdir(parents=True)
    assert virtual_time.run(run()) == (429, "127.0.0.1", 1, 200)


def test_who_hangs_up_before_the_engine_dies_is_suspected_too() -> None:
    async def run():
        async with Fleet(1) as fleet:
            gone = asyncio.Event()
            body = chat({"type": "text", "text": f"{KILLS} unseen"})
            pending = asyncio.ensure_future(call(fleet.app, body=body, leave=gone))
            await asyncio.sleep(0.01)
            gone.set()
            await asyncio.gather(pending, return_exceptions=True)
            # The engine's process ended all the same, as its supervisor says.
            fleet.app.engine_ended(0, other_cause=False)
            await asyncio.sleep(0.01)
            return fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == (1, 0)


def test_who_hangs_up_after_others_have_met_the_death_is_suspected_too() -> None:
    async def run():
        async with Fleet(1) as fleet:
            (engine,), gone = fleet.app.engines, asyncio.Event()
            body = chat({"type": "text", "text": "unseen"})
            pending = asyncio.ensure_future(call(fleet.app, body=body, leave=gone))
            await auntil(lambda: engine.outstanding == 1, "it to be sent")
            engine.note_death()  # as the 503 of a loop that has ended tells of another request
            gone.set()
            await asyncio.gather(pending, return_exceptions=True)
            return fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == (1, 0)


async def left_and_met(fleet: Fleet, text: str):
    """A client leaves the first engine, which ends; the next request finds nothing listening."""
    gone = asyncio.Event()
    body = chat({"type": "text", "text": KILLS})
    pending = asyncio.ensure_future(call(fleet.app, body=body, leave=gone))
    await auntil(lambda: fleet.app.engines[0].outstanding == 1, "it to be sent")
    gone.set()
    await asyncio.gather(pending, return_exceptions=True)
    fleet.kill(0)
    return await fleet.ask(text)


def test_who_finds_nothing_listening_knows_that_the_engine_ended() -> None:
    """Its supervisor sees that a moment later; an equal request would end an engine until then."""

    async def run():
        async with Fleet(3) as fleet:
            met = await left_and_met(fleet, KILLS)
            fleet.app.engine_ended(0, other_cause=False)
            return code(met), code(await fleet.ask(KILLS)), len(fleet.deaths)

    expected = (503, "engine_died"), (422, "convicted"), 2
    assert virtual_time.run(run()) == expected


def test_its_supervisor_may_know_another_cause() -> None:
    async def run():
        async with Fleet(3) as fleet:
            met = await left_and_met(fleet, "innocent")
            suspects = fleet.app.quarantine.suspects
            before = suspects.number
            fleet.app.engine_ended(0, other_cause=True)
            return met.status, before, suspects.number

    assert virtual_time.run(run()) == (200, (1, 0), (0, 0))


async def hang_up(fleet: Fleet, *beside: str, late: float = 0.0) -> None:
    """A client leaves at once; the engine ends of its request, as a supervisor sees later."""
    gone = asyncio.Event()
    body = chat({"type": "text", "text": f"{KILLS} unseen"})
    pending = asyncio.ensure_future(call(fleet.app, body=body, leave=gone))
    others = [asyncio.ensure_future(fleet.ask(text)) for text in beside]
    await auntil(lambda: fleet.app.engines[0].outstanding == 1 + len(beside), "it to be sent")
    gone.set()
    await asyncio.gather(pending, return_exceptions=True)
    fleet.kill(0)
    await asyncio.sleep(late)
    fleet.app.engine_ended(0, other_cause=False)
    await asyncio.gather(*others)


@pytest.mark.parametrize(
    ("times", "expected"), [((("innocent",),), (2, 0)), (((), ()), (0, 1)), (((),), (1, 0))]
)
def test_who_hangs_up_is_convicted_the_second_time_where_nobody_else_was_there(
    times, expected
) -> None:
    async def run():
        async with Fleet(1) as fleet:
            for beside in times:
                await fleet.all_up()
                await hang_up(fleet, *beside)
            await asyncio.sleep(0.01)
            return fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == expected


def test_who_hung_up_twice_before_one_death_is_told_of_once() -> None:
    """That an impatient client was alone when it left, twice, tells nothing of one death."""

    async def run():
        async with Fleet(1) as fleet:
            engine, known = fleet.app.engines[0], fleet.app.quarantine
            identity = RequestIdentity(Fingerprints(b"key"), "/", b"impatient", ("a client",))
            fingerprint = await identity.fingerprint()
            accused = Accused(fingerprint=fingerprint, sketch=identity.sketch)
            known.suspects.accuse(EngineDeath(0), accused)
            for arrivals in (1, 2):
                left = Departure(
                    time.monotonic(), identity, alone=True, arrivals=arrivals, begun=False
                )
                engine.left.append(left)
            engine.arrivals = 3  # another one came, and ended it
            fleet.app.engine_ended(0, other_cause=False)
            await settled()
            return known.suspects.number, known.suspects.suspicion(fingerprint).deaths

    assert virtual_time.run(run()) == ((1, 0), 2)


def test_who_hangs_up_is_convicted_though_the_supervisor_sees_the_end_late() -> None:
    async def run():
        async with Fleet(1) as fleet:
            await fleet.all_up()
            await hang_up(fleet)
            await fleet.all_up()
            await hang_up(fleet, late=12.0)
            await asyncio.sleep(0.01)
            return fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == (0, 1)


def test_an_engine_that_somebody_killed_accuses_nobody() -> None:
    async def run():
        async with Fleet(2) as fleet:
            pending = asyncio.ensure_future(fleet.ask("innocent"))
            await asyncio.sleep(0.1)
            fleet.kill(0)
            reply = await pending
            before = fleet.app.quarantine.suspects.number
            fleet.app.engine_ended(0, other_cause=True)
            return reply.status, before, fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == (503, (1, 0), (0, 0))


def test_who_left_an_engine_that_somebody_killed_is_not_accused_of_the_next_one_s_death() -> None:
    async def run():
        async with Fleet(1) as fleet:
            (engine,), gone = fleet.app.engines, asyncio.Event()
            body = chat({"type": "text", "text": "innocent"})
            pending = asyncio.ensure_future(call(fleet.app, body=body, leave=gone))
            await auntil(lambda: engine.outstanding == 1, "it to be sent")
            gone.set()
            await asyncio.gather(pending, return_exceptions=True)
            engine.failed_at = time.monotonic()  # a probe has met the dead process
            fleet.app.engine_ended(0, other_cause=True)
            left = len(engine.left), engine.failed_at
            # The next process ends of itself.
            fleet.app.engine_ended(0, other_cause=False)
            await fleet.app.quarantine.close()
            return left, fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == ((0, float("inf")), (0, 0))


def test_nobody_is_told_of_a_conviction_that_its_supervisor_takes_back() -> None:
    """A suspect runs alone, and somebody kills its engine."""

    async def killed(fleet: Fleet) -> tuple[int, str]:
        await fleet.all_up()
        pending = asyncio.ensure_future(fleet.ask("innocent"))
        await auntil(lambda: fleet.app.engines[0].outstanding == 1, "it to be sent")
        fleet.kill(0)
        return code(await pending)

    async def run():
        async with Fleet(1, restart=1.0) as fleet:
            told = [await killed(fleet), await killed(fleet)]
            convicted = fleet.app.quarantine.suspects.number
            fleet.app.engine_ended(0, other_cause=True)
            await fleet.all_up()
            return told, convicted, (await fleet.ask("innocent")).status

    assert virtual_time.run(run()) == ([(503, "engine_died")] * 2, (0, 1), 200)


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_a_request_that_meets_engines_which_answered_nobody_ends_two_at_most(engines) -> None:
    """Somebody killed all of them, idle; they are back, and nobody has asked them anything."""

    async def run():
        async with Fleet(engines, restart=1.0) as fleet:
            await fleet.all_up()
            for index in range(engines):
                fleet.kill(index, "by somebody")
                fleet.app.engine_ended(index, other_cause=True)
            await auntil(lambda: not fleet.recorder.down, "all engines to be back")
            probes, replies, suspected = fleet.recorder.probes, [], []
            for _ in range(3):
                replies.append(await fleet.ask(KILLS))
                suspected.append(fleet.app.quarantine.suspects.number)
                await auntil(lambda: not fleet.recorder.down, "all engines to be back")
            # Before the suspect ran again, the gateway asked an engine itself.
            assert fleet.recorder.probes > probes
            other = await fleet.ask("another")
            return replies, suspected, fleet.deaths.count("by somebody"), len(fleet.deaths), other

    replies, suspected, before, deaths, other = virtual_time.run(run())
    assert [code(reply) for reply in replies] == [
        (503, "engine_died"), (503, "engine_died"), (422, "convicted"),
    ]  # fmt: skip
    assert suspected == [(1, 0), (0, 1), (0, 1)]
    assert deaths - before == 2
    assert other.status == 200


def test_who_kills_the_next_process_pardons_nobody_of_the_death_before() -> None:
    async def run():
        async with Fleet(1) as fleet:
            await fleet.ask(KILLS)
            fleet.app.engine_ended(0, other_cause=False)
            # Its next process is killed while it starts.
            fleet.app.engine_ended(0, other_cause=True)
            return fleet.app.quarantine.suspects.number

    assert virtual_time.run(run()) == (1, 0)
