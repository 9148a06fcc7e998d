"""Times an engine's own forwards, as a part of `turbofit calibrate`, by requests to one engine.

One answer is streamed and watched. A forward passes between two pieces of the stream, so the time
between two pieces, a gap, has no HTTP and no tokenizer in it. Answers that are not streamed run
beside it: their number and context give the time of forwards that decode. Or the stream meets a
prompt or an image: one gap becomes longer by the forward that reads it. A reading is left out if
its gaps differ too much, or if the host held the engine up. The time that LMDeploy's own loop
spends between two forwards is in the gap, since clients wait for it, too.
"""

from __future__ import annotations

import asyncio
import json
import time
from asyncio import Task
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count, pairwise
from statistics import median, quantiles
from typing import Any, Final, NamedTuple

import aiohttp
from msgspec.structs import replace

from turbofit.core.images.rule import DummyImage
from turbofit.core.machine import MeasuredSteps, StepPoint
from turbofit.core.messages import counted
from turbofit.core.plan import EnginePlan, Plan
from turbofit.core.struct import T
from turbofit.memory.calibrated import weights_of
from turbofit.memory.engines import engine_of
from turbofit.planning.card_rates import rates_of, refuse_impossible
from turbofit.planning.speed import engine_rates, rates
from turbofit.planning.steps import refuse_contradictions
from turbofit.rehearsal.pretend.clock import HELD_UP, ClockFile, ClockReading, held_up_share
from turbofit.serving.engine.worst_requests import image_part

#: Numbers of answers at once, the most useful first: time may run out.
_SEQUENCES: Final = (1, 8, 32, 128, 2, 4, 16, 64)
_CONTEXTS: Final = (64, 512, 2048)
#: Tokens of a prompt. A shorter prompt takes no longer than a step of decoding, so that no gap
#: shows it.
_PROMPTS: Final = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
#: Tokens of a prompt, and the number of answers that it meets.
_BESIDE: Final = ((512, 8), (512, 32), (2048, 8))
#: Pixels of pictures with one, two, four, six and twelve tiles of InternVL2; from two tiles on a
#: thumbnail is added.
_SIZES: Final = ((448, 448), (896, 448), (896, 896), (1344, 896), (1792, 1344))
#: The most gaps of a reading beside other answers.
_PIECES: Final = 24
#: The fewest gaps of such a reading.
_LEAST_PIECES: Final = 8
#: Pieces of a watched answer before it meets the first prompt or image.
_FIRST: Final = 6
#: The most tokens of a watched answer; it is ended early, once it has met all prompts or images.
_WATCHED: Final = 1024
#: How often a watched answer meets the same prompt or image.
_REPEATS: Final = 3
#: Forwards that pass while requests arrive, besides one forward for each request.
_AHEAD: Final = 64
#: The largest spread of a reading: half of its gaps are within this share of the median.
_MOST_SPREAD: Final = 0.1
#: Seconds of the card; no point begins later.
_SECONDS: Final = 180.0
#: Prompts are made of tokens that are not special: the first id, and the number of ids used.
_TOKEN: Final = 100
_KINDS: Final = 900
#: Tokens of the question beside an image, with its template, at most.
_TEXT: Final = 96


class EngineAddress(NamedTuple):
    """Where an engine listens, the name of its model, and its API key if any."""

    url: str
    model: str
    key: str | None = None


class _HeldUpError(Exception):
    """Raised if a reading is not the time of a forward; the message says why."""


@asynccontextmanager
async def _running(answers: Iterable[Coroutine[Any, Any, T]]) -> AsyncIterator[list[Task[T]]]:
    """Run the answers of one reading; none of them runs on after the block, also if one fails."""
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class StepTimer:
    """Times forwards of one engine of a plan; ``clock``: the clock of pretend GPUs, else None."""

    def __init__(
        self, plan: Plan, engine: EnginePlan, address: EngineAddress, clock: ClockFile | None
    ) -> None:
        self._plan, self._engine, self._address, self._clock = plan, engine, address, clock
        #: How many times as long as on the card everything takes.
        self._slower = 1.0 if clock is None else clock.factor
        #: The numbers of requests; each number makes a prompt that no other request has.
        self._serial = count()

    def measure(self, tell: Callable[[str], None]) -> MeasuredSteps:
        """Return the timed forwards; ``tell`` receives the name of each measurement.

        Raises:
            UsageError: the times contradict each other, or the peaks of the cards.
        """
        if self._clock is not None:
            self._clock.run()
        steps = asyncio.run(self._measured(tell))
        refuse_contradictions(steps)
        return self._with_rates(steps)

    def _with_rates(self, steps: MeasuredSteps) -> MeasuredSteps:
        """Return the steps with the cards' rates that they show, for forecasts of other models."""
        machine, weights = self._plan.machine, weights_of(self._plan.model)
        if not weights:
            return steps
        plan = replace(self._plan, machine=replace(machine, calibrations=()))
        group = engine_rates(plan, self._engine)
        found = rates_of(group, steps, partial(group.launch_seconds, rates()))
        refuse_impossible(found, [machine.gpu(index) for index in self._engine.gpus])
        return replace(steps, weights=weights, rates=found)

    async def _measured(self, tell: Callable[[str], None]) -> MeasuredSteps:
        """Take one measurement after another; a failed or late one is left out, with the reason."""
        key, points, left_out = self._address.key, list[StepPoint](), list[str]()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # A server may end an idle connection at the moment when a request uses it.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        seconds = _SECONDS * self._slower
        patience, ends = aiohttp.ClientTimeout(total=seconds), time.monotonic() + seconds
        async with aiohttp.ClientSession(
            headers=headers, timeout=patience, connector=connector
        ) as self._session:
            for what, timed in self._tasks(left_out).items():
                if time.monotonic() > ends:
                    left_out.append(f"{what}: {_SECONDS:.0f} s had passed")
                    continue
                tell(what)
                before = None if self._clock is None else self._clock.read()
                began = time.monotonic()
                try:
                    point = await asyncio.wait_for(timed(), ends - time.monotonic())
                    self._refuse_held_up(before, began)
                except _HeldUpError as exc:
                    left_out.append(f"{what}: {exc}")
                except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, LookupError) as exc:
                    left_out.append(f"{what}: no answer ({type(exc).__name__})")
                else:
                    points.append(point)
        policy = self._engine.settings.quant_policy
        return MeasuredSteps(quant_policy=policy, points=tuple(points), left_out=tuple(left_out))

    def _tasks(self, left_out: list[str]) -> dict[str, Callable[[], Awaitable[StepPoint]]]:
        """Return the measurements within the engine's batch, cache and forward, by name.

        ``left_out`` receives the names of other measurements, with the reason.
        """
        batch, most = self._engine.settings.max_batch_size, self._longest_prompt
        tasks: dict[str, Callable[[], Awaitable[StepPoint]]] = {}
        for prompt in sorted({min(prompt, most) for prompt in _PROMPTS}):
            tasks[f"a prompt of {prompt:,} tokens"] = partial(self._prompt, prompt)
        for units, image in sorted(self._pictures.items()):
            tasks[f"an image of {counted(units, 'vision unit')}"] = partial(
                self._image, units, image
            )
        for prompt, answers in _BESIDE:
            held = prompt + answers * (_CONTEXTS[0] + _WATCHED)
            if prompt + answers <= most and answers <= batch and held <= self._engine.kv.tokens:
                what = f"a prompt of {prompt:,} tokens beside {counted(answers, 'sequence')}"
                tasks[what] = partial(self._prompt, prompt, answers)
        for sequences, context in self._decodings:
            what = f"{counted(sequences, 'sequence')} of {context:,} tokens"
            tasks[what] = partial(self._decode, sequences, context)
        if most < _PROMPTS[-1]:
            left_out.append(f"longer prompts: not reached: one forward reads {most:,} tokens")
        if batch < max(_SEQUENCES):
            left_out.append(
                f"more sequences: not reached: the plan has {counted(batch, 'request')} at once"
            )
        return tasks

    @property
    def _decodings(self) -> list[tuple[int, int]]:
        """The decoding steps to time: numbers of sequences, each with contexts that fit the cache.

        The numbers go up to the plan's batch.
        """
        settings, found = self._engine.settings, list[tuple[int, int]]()
        reached = [sequences for sequences in _SEQUENCES if sequences < settings.max_batch_size]
        for sequences in (*reached[:1], settings.max_batch_size, *reached[1:]):
            room = min(settings.session_len, self._engine.kv.tokens // sequences)
            room -= self._answer(sequences) + _CONTEXTS[0]
            contexts = {min(context, room) for context in _CONTEXTS if room >= _CONTEXTS[0]}
            found += [(sequences, context) for context in sorted(contexts)]
        return found

    @property
    def _pictures(self) -> dict[int, DummyImage]:
        """The images to time, which fit into one forward, by their vision units."""
        rule, limits = self._plan.model.image_rule, self._plan.promise.limits
        if rule is None or limits.image_limit is None or limits.vision_unit is None:
            return {}
        knobs = rule.knobs(limits.image_limit) if rule.client_knobs else {}
        return {
            rule.units(*size, limits.image_limit): DummyImage(size, knobs)
            for size in reversed(_SIZES)
            if rule.tokens(*size, limits.image_limit) + _TEXT <= self._longest_prompt
        }

    @property
    def _longest_prompt(self) -> int:
        """The most tokens of a prompt that fit into one forward beside the watched answer."""
        settings, room = self._engine.settings, self._engine.kv.tokens - 2 * _CONTEXTS[0]
        forward = engine_of(self._plan).forward_tokens(settings) - 2
        return min(forward, settings.session_len - 8, room - _WATCHED)

    def _answer(self, sequences: int) -> int:
        """Return the tokens of an answer that is not ended before all ``sequences`` have begun.

        Each sequence may begin with a forward of its own, besides the forwards that read prompts.
        """
        forward = engine_of(self._plan).forward_tokens(self._engine.settings)
        return _PIECES + _AHEAD + sequences + sequences * _CONTEXTS[-1] // forward

    async def _decode(self, sequences: int, context: int) -> StepPoint:
        """Watch one of ``sequences`` equal answers, while all of them run.

        The last gaps before the first answer ends are steps of all answers: an answer of `_answer`
        tokens is long enough that all others have begun by then.
        """
        answer = self._answer(sequences)
        others = [self._ended(self._body(context, answer)) for _ in range(sequences - 1)]
        watched = self._watch(self._body(context, answer))
        async with _running([watched]) as (watching,), _running(others) as asked:
            ends = await asyncio.gather(*asked)
            pieces = await watching
        first_end = min(ends, default=pieces[-1])
        beside_all = [piece for piece in pieces if piece <= first_end][-_PIECES - 1 :]
        seconds, spread = self._median([after - before for before, after in pairwise(beside_all)])
        # The cache at the middle of the gaps: all tokens, without those that come later.
        middle = (beside_all[0] + beside_all[-1]) / 2
        tokens_to_come = sum((end - middle) / seconds for end in (*ends, pieces[-1]))
        cached = round(sequences * (context + answer) - tokens_to_come)
        return self._point(seconds, spread, sequences=sequences, cached=cached)

    async def _prompt(self, tokens: int, answers: int = 1) -> StepPoint:
        return await self._beside(lambda: self._ask(self._body(tokens, 1)), tokens, answers=answers)

    async def _image(self, units: int, image: DummyImage) -> StepPoint:
        def ask() -> Awaitable[int]:
            colour = next(self._serial) * 4099 % (1 << 24)
            content = [image_part(image, colour), {"type": "text", "text": "What?"}]
            chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            return self._ask(chat, "/v1/chat/completions")

        return await self._beside(ask, 0, units)

    async def _beside(
        self, ask: Callable[[], Awaitable[int]], prompt: int, units: int = 0, answers: int = 1
    ) -> StepPoint:
        """Watch answers that meet a request several times; each request makes one gap longer.

        ``prompt``: the request's tokens, if the engine does not count them; ``units``: the vision
        units of the request's image.
        """
        context, enough = _CONTEXTS[0], asyncio.Event()
        length = min(_WATCHED, self._engine.settings.session_len - context)
        started = [asyncio.Event() for _ in range(answers)]
        body = partial(self._body, context, length)
        asked = []
        async with _running([self._watch(body(), event, enough) for event in started]) as watched:
            await asyncio.gather(*(event.wait() for event in started))
            for _ in range(_REPEATS):
                began = time.perf_counter()
                prompt = await ask() or prompt
                asked.append((began, time.perf_counter()))
            enough.set()
            pieces, *_ = await asyncio.gather(*watched)
        # The times of two neighbouring pieces, with the tokens of the watched answer in the cache.
        pauses = list(enumerate(pairwise(pieces[1:]), start=context + 2))
        longest = [
            max(
                (after - before, tokens)
                for tokens, (before, after) in pauses
                if after > began and before < ended
            )
            for began, ended in asked
            if ended < pieces[-1]
        ]
        seconds, spread = self._median([gap for gap, _ in longest], least=_REPEATS)
        cached = answers * round(median(tokens for _, tokens in longest))
        return self._point(
            seconds, spread, sequences=answers, cached=cached, prompt=prompt, units=units
        )

    def _median(self, gaps: Sequence[float], least: int = _LEAST_PIECES) -> tuple[float, float]:
        """Return the median gap, and the share of the median within which half of the gaps lie."""
        if len(gaps) < least:
            raise _HeldUpError(f"{counted(len(gaps), 'reading')}, too few")
        middle = median(gaps)
        low, _, high = quantiles(gaps, n=4)
        spread = (high - low) / 2 / middle if middle else float("inf")
        if spread > _MOST_SPREAD:
            raise _HeldUpError(f"the readings differ by {spread:.0%}, too much for steps")
        return middle, spread

    def _point(self, seconds: float, spread: float, **work: int) -> StepPoint:
        return StepPoint(seconds=seconds / self._slower, spread=round(spread, 4), **work)

    def _refuse_held_up(self, before: ClockReading | None, began: float) -> None:
        if self._clock is not None and before is not None:
            after, passed = self._clock.read(), time.monotonic() - began
            share = held_up_share(after.late - before.late, after.idle - before.idle, passed)
            if share > HELD_UP:
                raise _HeldUpError(
                    f"this host held the pretend GPUs up for {share:.0%} of the time"
                )

    def _body(self, tokens: int, answer: int) -> dict[str, Any]:
        """Return a request that shares no prefix with any other request."""
        high, low = divmod(next(self._serial), _KINDS)
        ids = [_TOKEN + low, _TOKEN + high % _KINDS] + [_TOKEN] * (tokens - 2)
        return {"input_ids": ids, "max_tokens": answer}

    async def _ended(self, body: dict[str, Any]) -> float:
        await self._ask(body)
        return time.perf_counter()

    async def _ask(self, body: dict[str, Any], path: str = "/generate") -> int:
        """Send a request; return its prompt's tokens, 0 if the engine does not count tokens."""
        async with self._post(body, path) as response:
            response.raise_for_status()
            answer = json.loads(await response.read())
            return int(answer.get("usage", {}).get("prompt_tokens", 0))

    async def _watch(
        self,
        body: dict[str, Any],
        started: asyncio.Event | None = None,
        enough: asyncio.Event | None = None,
    ) -> list[float]:
        """Return the times at which the pieces of a streamed answer came.

        ``started`` is set after `_FIRST` pieces. At the first piece after ``enough`` is set, the
        stream is closed, and the engine ends the answer.
        """
        times: list[float] = []
        try:
            async with self._post({**body, "stream": True}, "/generate") as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        times.append(time.perf_counter())
                    if started is not None and len(times) >= _FIRST:
                        started.set()
                    if enough is not None and enough.is_set():
                        break
        finally:
            if started is not None:
                started.set()
        if len(times) < 2:
            raise _HeldUpError("the answer came in one piece")
        return times

    def _post(self, body: dict[str, Any], path: str) -> Any:
        data = {"model": self._address.model, "ignore_eos": True, **body}
        return self._session.post(self._address.url + path, json=data)
