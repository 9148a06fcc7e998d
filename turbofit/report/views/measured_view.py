"""The documents of a load, a tuning, a calibration, and a command on pretend GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from turbofit.core.messages import PRETEND_SPEED, counted
from turbofit.core.units import format_bytes, format_duration, mib, three_digits
from turbofit.report.painters.document import (
    Heading,
    Items,
    Paragraph,
    Table,
    known_facts,
    remark,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from turbofit.core.struct import Document
    from turbofit.core.tuning import (
        Capacity,
        CapacityLoad,
        SpeedFigures,
        TrialRecord,
        Tuning,
        TurnFigures,
    )
    from turbofit.measure.load.result import LoadResult, Spread
    from turbofit.report.painters.document import Block


def load_view(result: LoadResult) -> list[Block]:
    """Return the rates of a load, a table of its times, and its errors and warnings."""
    given, failed = result.load, result.begun - result.answered
    rate = three_digits(result.requests_per_second)
    tokens = three_digits(result.output_tokens_per_second)
    arrivals = f"a closed loop of {given.get('concurrency', 8)}"
    if "rate" in given:
        arrivals = f"{given['rate']} requests arrive a second"
    prompt = "" if result.prompt_tokens is None else f"{result.prompt_tokens:,.0f} prompt tokens, "
    figures = {
        "load": f"{arrivals}; {prompt}{result.output_tokens:,.0f} tokens an answer",
        "requests/s": f"{rate}, {result.answered:,} answered in {result.seconds:,.1f} s, "
        f"{failed:,} not",
        "tokens/s": f"{tokens}, {result.running:.1f} requests at once",
    }
    titles = ("", "mean", "p50", "p90", "p99", "most")
    rows = (
        _row("first token (TTFT)", result.ttft),
        _row("token after it (TPOT)", result.tpot),
        _row("whole answer (E2E)", result.e2e),
    )
    wrong = [
        f"{error.count:,} x {error.kind}: {error.example}".rstrip(": ") for error in result.errors
    ]
    if result.warm_up_errors:
        wrong.append(f"{counted(result.warm_up_errors, 'request')} of the warm-up failed")
    wrong += (text for text in result.warnings if text != PRETEND_SPEED)
    return [
        Heading(f"{result.model} at {result.url}"),
        *([Paragraph(PRETEND_SPEED, tone="bad")] if PRETEND_SPEED in result.warnings else []),
        *([Paragraph(result.forecast, tone="warn")] if result.forecast else []),
        known_facts(figures),
        table(titles, rows, right=titles[1:]),
        *_turns(result.turns),
        *([Items(tuple(wrong), tone="warn")] if wrong else []),
    ]


def _seconds(value: float) -> str:
    """Return a time of ``value`` seconds as a text: ``1.23 s``, ``45.6 ms``."""
    return f"{three_digits(value)} s" if value >= 1 else f"{three_digits(1000 * value)} ms"


def _row(name: str, spread: Spread) -> tuple[str, ...]:
    if not spread.count:
        return (name, "-", "-", "-", "-", "-")
    times = (spread.mean, spread.p50, spread.p90, spread.p99, spread.most)
    return (name, *(_seconds(time) for time in times))


def _turns(turns: Sequence[TurnFigures]) -> list[Block]:
    """Return a table of the first tokens by turn; nothing without conversations."""
    if not turns:
        return []
    titles = ("turn", "answered", "TTFT p50", "p90", "from the prefix cache")
    rows = (
        (
            str(turn.turn), f"{turn.answered:,}", _seconds(turn.ttft_p50), _seconds(turn.ttft_p90),
            turn.cached_words,
        )
        for turn in turns
    )  # fmt: skip
    return [table(titles, rows, right=titles[1:])]


def tune_view(result: Tuning) -> list[Block]:
    """Return the best settings of a tuning and all trials."""
    where = f" on {' + '.join(result.gpus)}" if result.gpus else ""
    if result.capacity is not None:
        return _capacity_view(result, result.capacity, where)
    best = [place for place, trial in enumerate(result.trials) if trial.number == result.best]
    return [
        Heading(f"Tuning of {result.model}{where}"),
        *_notes(result),
        Heading("Every trial beside its forecast", whole=False),
        replace(_trials(result), chosen=best[0] if best else None),
    ]


def _notes(result: Tuning) -> list[Block]:
    """Return the best trial in words and figures, and what was not tried."""
    blocks: list[Block] = []
    if result.forecast:
        blocks.append(Paragraph(result.forecast, tone="warn"))
    elif result.pretend:
        blocks.append(Paragraph(PRETEND_SPEED, tone="bad"))
    winner = result.winner
    if winner is None or winner.measured is None:
        why = "keeps the SLO" if result.slo else "served"
        found = f"none of {counted(len(result.trials), 'setting')} {why}"
        if result.started:
            found = (
                f"{result.started} of {counted(len(result.trials), 'setting')} started and answered"
            )
        blocks.append(Paragraph(found, tone="plain" if result.started else "bad"))
    else:
        first = next((trial for trial in result.trials if not trial.options), None)
        gain = ""
        if first is not None and first.measured is not None and winner.options:
            ratio = winner.measured.requests_per_second / first.measured.requests_per_second
            gain = f", {ratio - 1:+.0%} against the plan without tuning"
        text = f"best: {winner.settings}{gain}"
        speed = winner.measured
        # Under the clock no forecast stands beside: it leaves out that requests queue there.
        beside = "" if result.forecast else f", forecast {winner.forecast.words}"
        figures = {
            "requests/s": f"{speed.requests_per_second:.2f}{beside}",
            "first token, median": _percentiles(speed, "ttft"),
            "a token, median": _percentiles(speed, "tpot"),
            "tokens/s": f"{speed.output_tokens_per_second:,.0f}, of answers",
        }
        blocks.append(Paragraph(text, tone="good"))
        blocks.append(known_facts(figures))
        blocks += _turns(speed.turns)
        if winner.quant_policy:
            text = f"the cache is stored with {winner.quant_policy} bits: answers change a little"
            blocks.append(Paragraph(f"{text} (--kv-types 0 leaves it out)", tone="warn"))
    trials = counted(len(result.trials), "trial")
    text = f"{trials} in {format_duration(result.seconds)}; {result.stopped}"
    return [*blocks, remark(text)]


def _percentiles(speed: SpeedFigures, name: str) -> str:
    """Return the median, p90 and p99 of the times ``name``, ``ttft`` or ``tpot``, as a text."""
    p50, p90, p99 = (getattr(speed, f"{name}_{share}") for share in ("p50", "p90", "p99"))
    return f"{_seconds(p50)}, p90 {_seconds(p90)}{f', p99 {_seconds(p99)}' if p99 else ''}"


def _capacity_view(result: Tuning, capacity: Capacity, where: str) -> list[Block]:
    """Return how many clients kept the SLO, and a table of the loads."""
    limits = ", ".join(f"{name} {_seconds(limit)}" for name, limit in result.slo.items())
    failed = [it.clients for it in capacity.loads if it.clients is not None and not it.keeps]
    clients = capacity.clients
    if not clients and not capacity.loads:
        text = f"nothing was measured: {capacity.why}"
    elif not clients:
        text = f"not even one client keeps {limits} (90 %)"
    elif capacity.more:
        text = f"kept {limits} (90 %): {clients} at once, or more"
    else:
        text = f"kept {limits} (90 %): {clients} at once, not {min(failed)}"
    if capacity.rate is not None:
        what = "conversations" if _turns_kept(capacity) else "requests"
        text += f"; {three_digits(capacity.rate)} {what} a second"
    right = ("requests/s", "tokens/s", "TTFT p50", "p90", "p99", "TPOT p50", "TPOT p90")
    rows = (_capacity_row(load) for load in capacity.loads)
    return [
        Heading(f"Clients of {result.model}{where}"),
        Paragraph(result.forecast, tone="warn"),
        Paragraph(text, tone="good" if clients else "bad"),
        table(("load", *right, "SLO"), rows, right=right),
        *([Paragraph(capacity.why, tone="warn")] if capacity.why and capacity.loads else []),
        *_turns(_turns_kept(capacity)),
        remark(f"{counted(len(capacity.loads), 'load')} in {format_duration(result.seconds)}"),
    ]


def _turns_kept(capacity: Capacity) -> Sequence[TurnFigures]:
    """Return the turns of the load with the most clients that kept the SLO; else of the first."""
    kept = [load for load in capacity.loads if load.keeps and load.clients == capacity.clients]
    loads = kept or capacity.loads
    return loads[0].measured.turns if loads else ()


def _capacity_row(load: CapacityLoad) -> tuple[str, ...]:
    """Return the row of a load: its clients or rate, its speed, and whether the SLO was kept."""
    speed, rate = load.measured, load.rate
    arrivals = f"{load.clients} at once" if rate is None else f"{three_digits(rate)} a second"
    times = (speed.ttft_p50, speed.ttft_p90, speed.ttft_p99, speed.tpot_p50, speed.tpot_p90)
    return (
        arrivals, f"{speed.requests_per_second:.2f}", f"{speed.output_tokens_per_second:,.0f}",
        *(_seconds(time or 0.0) for time in times), "kept" if load.keeps else "not kept",
    )  # fmt: skip


def _trials(result: Tuning) -> Table:
    right = ("", "forecast", "requests/s", "TTFT p90", "TPOT p90")
    titles = ("", "settings", *right[1:], "how it went")
    rows = (_trial_row(trial, result) for trial in result.trials)
    return table(titles, rows, right=right, wrap=("settings", "how it went"))


def _trial_row(trial: TrialRecord, result: Tuning) -> tuple[str, ...]:
    """Return the row of a trial: its forecast beside its figures, or why it has none."""
    forecast = trial.forecast.words
    if trial.measured is None:
        return (str(trial.number), trial.settings, forecast, "-", "-", "-",
                f"{trial.outcome}: {trial.why}")  # fmt: skip
    measured = trial.measured
    marks = ["best"] if trial.number == result.best else []
    marks += [] if trial.meets_slo else ["misses the SLO" if result.slo else "not all answered"]
    return (
        str(trial.number), trial.settings, forecast, f"{measured.requests_per_second:.2f}",
        _seconds(measured.ttft_p90), _seconds(measured.tpot_p90), ", ".join(marks),
    )  # fmt: skip


def calibration_view(result: Document) -> list[Block]:
    """Return the view of a document ``turbofit.calibration/1``; its sizes are bytes."""
    blocks: list[Block] = [Heading(f"Calibration of {result['model'].partition(' (')[0]}")]
    whose, plans = "your", "later plans"
    if result.get("pretend"):
        whose, plans = "pretend", "later plans on pretend GPUs"
        text = "PRETEND GPUs: this tries the calibration, and says nothing of any card"
        blocks.append(Paragraph(text, tone="bad"))
    titles = ("GPU", "in use, MiB", "forecast", "measured", "paid, not taken")
    rows = (
        (str(row["gpu"]), row["phase"], mib(row["forecast"]), mib(row["measured"]),
         f"{row['over'] / (1 << 20):+,.1f}")
        for row in result["phases"]
    )  # fmt: skip
    blocks.append(table(titles, rows, right=titles[2:], wrap=("in use, MiB",)))
    if result["why_not"] is not None:
        blocks.append(Paragraph(f"nothing was learned: {result['why_not']}", tone="bad"))
        return blocks
    names = " + ".join(
        dict.fromkeys(
            name for calibration in result["calibrations"] for name in calibration["gpus"]
        )
    )
    highest = max(result["phases"], key=lambda row: int(row["measured"]))
    less = highest["over"]
    taken = f"{format_bytes(abs(less))} {'less' if less > 0 else 'more'} than assumed"
    text = f"{whose} cards ({names}) take {taken if less else 'what was assumed'}"
    return [*blocks, Paragraph(f"{text}; {plans} use this", tone="good")]


def pretend_view(document: Document) -> Iterator[Block]:
    """Yield the view of the document of `turbofit pretend`."""
    yield Heading(f"PRETEND GPUs: {' '.join(document['command'])}")
    yield from _end(document)
    yield Heading("Cards at the peak of all processes together (MiB)")
    sizes = ("total", "used_by_others", "peak", "left_at_peak")
    yield _table(
        ("GPU", "name", "total", "others", "peak", "left"),
        (
            (str(gpu["gpu"]), gpu["name"], *(mib(gpu[size]) for size in sizes))
            for gpu in document["gpus"]
        ),
    )
    if document["processes"]:
        yield Heading("Processes (MiB)")
        yield from _processes(document["processes"])
    if document["pinned_peak"]:
        pinned = format_bytes(document["pinned_peak"])
        yield Paragraph(f"page-locked host memory: at most {pinned}")
    yield remark(f"{document['pretend']}; what each card held is")


def _end(document: Mapping[str, Any]) -> Iterator[Block]:
    """Yield how a command on pretend GPUs ended, and its last refused allocation."""
    code, killer = document["exit_code"], document["signal"]
    failed = bool(code or killer)
    end = f"killed by {killer}" if killer else f"ended with exit code {code}"
    text = f"{end if failed else 'ended well'} after {document['seconds']:.1f} s"
    yield Paragraph(text, tone="bad" if failed else "good")
    refused = document["refused"]
    if refused is None:
        return
    times = f"; {refused['count']} were refused in all" if refused["count"] > 1 else ""
    lacked = f"{format_bytes(refused['short'])} short"
    if refused["simulated"]:
        lacked = f"simulated, allocation {refused['simulated']} was to fail"
    yield Paragraph(
        f"last refused: {format_bytes(refused['asked'])} ({refused['kind']}) on GPU "
        f"{refused['gpu']}, where {format_bytes(refused['left'])} were free: {lacked}{times}",
        tone="bad" if failed else "warn",
    )
    yield known_facts(
        {
            "by": f"{refused['pid']} {refused['command']}",
            "phase": refused["phase"],
            "where": refused["site"] or "not known",
        }
    )


def _processes(processes: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Yield a table of the GPU memory of each process, and the commands."""
    rows = (
        (
            str(process["pid"]),
            str(gpu["gpu"]),
            *(mib(gpu[k]) for k in ("context", "peak", "held_at_end", "at_combined_peak")),
            gpu["phase"],
        )
        for process in processes
        for gpu in process["gpus"]
    )
    yield _table(("pid", "GPU", "context", "peak", "at end", "of the cards' peak", "phase"), rows)
    yield Items(tuple(f"{p['pid']}: {p['command']}" for p in processes), tone="dim")
    for process in processes:
        if not process["complete"]:
            text = "its timeline is full; phases and calls after that are missing"
            yield Paragraph(f"{process['pid']}: {text}", tone="warn")


def _table(titles: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table:
    numbers = [title for title in titles if title not in ("name", "phase")]
    return table(titles, rows, right=numbers, wrap=("phase",))
