"""The results of a load, from its answers: the document of `turbofit bench --json`."""

from __future__ import annotations

from bisect import bisect_left
from math import ceil
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

from turbofit.core.struct import Struct, const, doc
from turbofit.core.tuning import TurnFigures
from turbofit.core.units import grouped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from turbofit.measure.load.client import Answer

BENCH_SCHEMA: Final = "turbofit.bench/1"


class Spread(Struct):
    """How a time in seconds is distributed over requests; all values are 0 if ``count`` is 0."""

    count: Annotated[int, doc("Requests that have this time.")] = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    most: float = 0.0


class ErrorCount(Struct):
    """How many requests of a load failed for one reason; ``kind`` names the reason."""

    kind: Annotated[str, doc("no connection, status 503, stalled, garbage, cut short, …")]
    count: int
    example: Annotated[str, doc("What the server said once.")] = ""


class ClientShare(Struct):
    """How busy and how late the load's client was.

    If the client was too busy, the server is faster than the results say.
    """

    busy: Annotated[float, doc("CPU seconds a second of the process that sent the load.")] = 0.0
    late: Annotated[float, doc("Seconds by which an arrival was late at most.")] = 0.0


class LoadResult(Struct):
    """The results of a load on a server. Times are in seconds, rates are of the window."""

    schema: Annotated[str, const(BENCH_SCHEMA)] = BENCH_SCHEMA
    turbofit_version: str
    created: str
    url: str
    model: str
    load: Annotated[dict[str, object], doc("The options of the load that were given.")]
    seconds: Annotated[float, doc("Of the window: after the warm-up, before the end.")]
    stopped: Annotated[str, doc("Why it ended before its time; empty where it did not.")] = ""
    begun: Annotated[int, doc("Requests that began in the window.")]
    answered: Annotated[int, doc("Those of them that were answered.")]
    errors: tuple[ErrorCount, ...] = ()
    warm_up_errors: Annotated[int, doc("Requests that failed before the window.")] = 0
    requests_per_second: Annotated[
        float,
        doc("Each answered request counts by the share of its time that lies in the window."),
    ]
    output_tokens_per_second: Annotated[float, doc("Tokens that came in the window.")]
    running: Annotated[float, doc("Requests under way, on average.")]
    prompt_tokens: Annotated[float | None, doc("Of a request on average, by the server.")] = None
    output_tokens: Annotated[float, doc("Of an answer on average.")] = 0.0
    counted: Annotated[
        str, doc("usage: the server counts tokens; pieces: pieces of the stream (too few).")
    ] = "usage"
    ttft: Annotated[Spread, doc("To the first token.")] = Spread()
    tpot: Annotated[Spread, doc("A token after the first.")] = Spread()
    e2e: Annotated[Spread, doc("To the end of the answer.")] = Spread()
    turns: Annotated[tuple[TurnFigures, ...], doc("By turn, with --turns above 1.")] = ()
    client: ClientShare = ClientShare()
    forecast: Annotated[
        str, doc("On pretend GPUs: by which forecast time passes, and how certain it is.")
    ] = ""
    warnings: tuple[str, ...] = ()


class Window(NamedTuple):
    """The part of a load that is measured, between two times in seconds."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return max(self.end - self.begin, 0.0)

    def overlap(self, answer: Answer) -> float:
        assert answer.ended is not None
        return max(0.0, min(answer.ended, self.end) - max(answer.begun, self.begin))

    def share(self, answer: Answer) -> float:
        assert answer.ended is not None
        return self.overlap(answer) / max(answer.ended - answer.begun, 1e-9)

    def tokens(self, answer: Answer) -> float:
        """Return how many tokens of an answer came in the window.

        It assumes that all pieces of a stream have equally many tokens, and that the tokens of an
        answer in one piece come evenly.
        """
        if answer.whole:
            return answer.tokens * self.share(answer)
        if not answer.pieces:
            return 0.0
        came = bisect_left(answer.pieces, self.end) - bisect_left(answer.pieces, self.begin)
        return answer.tokens * came / len(answer.pieces)

    def failed_before(self, answer: Answer) -> bool:
        """Return whether a request began before the window, in the warm-up, and failed."""
        return bool(answer.kind) and not answer.counts and answer.begun <= self.begin

    def per_second(self, amount: Callable[[Answer], float], answers: Sequence[Answer]) -> float:
        return sum(map(amount, answers)) / self.seconds if self.seconds else 0.0


def spread(values: Iterable[float | None]) -> Spread:
    """Return the mean and the percentiles of values in seconds, without the values None.

    ``p90``, for example, is the least value that 90 % of the values do not exceed.
    """
    rising = sorted(value for value in values if value is not None)
    if not rising:
        return Spread()

    def percentile(share: float) -> float:
        return rising[ceil(share * len(rising)) - 1]

    return Spread(
        count=len(rising), mean=sum(rising) / len(rising), p50=percentile(0.5),
        p90=percentile(0.9), p99=percentile(0.99), most=rising[-1],
    )  # fmt: skip


def turns_of(answers: Sequence[Answer]) -> tuple[TurnFigures, ...]:
    """Return the first tokens of answers, and the prompts' share from the prefix cache, by turn."""
    by_turn = grouped((answer.turn, answer) for answer in answers)
    return tuple(_figures_of_turn(turn, by_turn[turn]) for turn in sorted(by_turn))


def _figures_of_turn(turn: int, answers: Sequence[Answer]) -> TurnFigures:
    ttft = spread(answer.ttft for answer in answers)
    known = [answer for answer in answers if answer.cached_tokens is not None]
    prompts = sum(answer.prompt_tokens or 0 for answer in known)
    cached = sum(answer.cached_tokens or 0 for answer in known)
    return TurnFigures(
        turn=turn, answered=len(answers), ttft_p50=ttft.p50, ttft_p90=ttft.p90,
        cached=cached / prompts if prompts else None,
    )  # fmt: skip
