"""What a load measured: the document of `turbofit bench --json`."""

from __future__ import annotations

from typing import Annotated, Final

from turbofit.core.struct import Struct, const, doc

__all__ = ["BENCH_SCHEMA", "ClientShare", "ErrorCount", "LoadMoment", "LoadResult", "Spread"]

BENCH_SCHEMA: Final = "turbofit.bench/1"


class Spread(Struct):
    """A time in seconds over requests; 0 of each where ``count`` is 0."""

    count: Annotated[int, doc("Requests that have this time.")] = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    most: float = 0.0


class ErrorCount(Struct):
    """Requests that ended without an answer, by the reason."""

    kind: Annotated[str, doc("no connection, status 503, stalled, garbage, cut short, …")]
    count: int
    example: Annotated[str, doc("What the server said once.")] = ""


class LoadMoment(Struct):
    """One step of the window."""

    at: Annotated[float, doc("Seconds after the window began, of the step's end.")]
    output_tokens_per_second: float
    running: Annotated[float, doc("Requests under way, on average.")]


class ClientShare(Struct):
    """What the load itself took: where it was busy, its figures are below the server's."""

    busy: Annotated[float, doc("CPU seconds a second of the process that sent the load.")] = 0.0
    late: Annotated[float, doc("Seconds by which an arrival was late at most.")] = 0.0


class LoadResult(Struct):
    """A load on a server. Times are seconds, rates are of the window."""

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
    moments: tuple[LoadMoment, ...] = ()
    client: ClientShare = ClientShare()
    warnings: tuple[str, ...] = ()
