"""Compares what the clock of pretend GPUs gives with its table and with measured figures.

    python -m bench.clock [--only GROUP ...] [--clock 8] [--write]

Each group starts `turbofit serve --pretend`, under LMDeploy's own scheduler, and replaces its lines
of results.jsonl; ``--write`` makes RESULTS.md of them. A load that this host held up has no figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

import turbofit
from bench.clock.forms import FORMS, NO_QUEUE, PLANS, SHORT, given
from bench.clock.loads import Line, Sent, closed, photograph, poisson, stream_beside
from bench.page import ran_on, table
from bench.speed.forecast import forecast as formula_of
from bench.speed.forecast import setup_of
from bench.speed.rows import read_rows
from tests.support.processes import Child
from tests.support.serving import serve_pretend, start_turbofit
from turbofit.core.errors import UnservedError
from turbofit.core.machine import Calibration
from turbofit.core.plan import Plan
from turbofit.core.struct import known
from turbofit.machine.source import save_snapshot
from turbofit.machine.spec import parse_spec
from turbofit.measure.load.driver import bench
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_space import forecast_of
from turbofit.planning.speed import rates
from turbofit.rehearsal.plan_clock import step_table
from turbofit.rehearsal.pretend.clock import StepTable

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.jsonl", HERE / "RESULTS.md"


class Clocked(NamedTuple):
    """A server on pretend GPUs with a clock, and its clock's table."""

    url: str
    table: StepTable
    plan: Plan


class Servers:
    """Starts one server after another, each with a state folder of its own; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.children = folder, list[Child]()

    def start(self, model: str, on: str, factor: float, *words: str, **environ: Any) -> Clocked:
        """Return a server that is ready; the one before has ended."""
        self.end()
        state = self.folder / str(len(list(self.folder.iterdir())))
        served = serve_pretend(
            self.children, state, model, "--on", on, "--engine", "turbomind", "--no-rehearse",
            "--drain", "1", "--clock", f"{factor:g}", *words, **environ,
        )  # fmt: skip
        served.wait()
        plan = Plan.from_json((served.run / "plan.json").read_bytes())
        return Clocked(served.url, step_table(plan, plan.engines[0]), plan)

    def end(self) -> None:
        """End the server that runs."""
        while self.children:
            self.children.pop().kill()


def step_of(server: Clocked, at_once: int, prompt: int, output: int) -> float:
    """The table's seconds of a step of so many answers, in the mean."""
    cached = at_once * (prompt + output / 2)
    return server.table.forward[at_once] + cached * server.table.context


def first_of(server: Clocked, prompt: int) -> float:
    """The table's seconds of a prompt and of a step, which LMDeploy prepares before it answers."""
    most = server.plan.engines[0].settings.max_prefill_token_num
    whole, rest = divmod(prompt, most)
    chunks = whole * server.table.forward[most] + (server.table.forward[rest] if rest else 0.0)
    return chunks + prompt**2 / 2 * server.table.pair + step_of(server, 1, prompt, 0)


def line_of(group: str, what: str, sent: Sent | None, **figures: Any) -> Line:
    """Return a line with the load of this host, and how much it held up what was sent."""
    held_up, load = sent.held_up if sent else 0.0, round(os.getloadavg()[0], 1)
    return Line(group, what, held_up=held_up, load=load, **figures)


def steps(group: str, what: str, server: Clocked, *clients: int) -> Iterator[Line]:
    for at_once in clients:
        sent = asyncio.run(closed(server.url, at_once, at_once, prompt=64, output=64))
        expected = 1e3 * step_of(server, at_once, 64, 64)
        yield line_of(
            group, f"{what}, {at_once} at once", sent, table=expected, clock=1e3 * sent.step
        )


def construction(servers: Servers, factor: float) -> Iterator[Line]:
    """Steps of 1, 16 and 64 sequences; prompts of 64 to 16,000 tokens, alone."""
    server = servers.start("qwen2.5-7b", "1xa100-80g", factor)
    yield from steps("construction", "a token", server, 1, 16, 64)
    for prompt in (64, 1024, 4096, 16000):
        sent = asyncio.run(closed(server.url, 1, 3, prompt=prompt, output=2))
        yield line_of(
            "construction", f"first token, {prompt:,} tokens", sent,
            table=1e3 * first_of(server, prompt), clock=1e3 * sent.first.p50,
        )  # fmt: skip


def tensor_parallel(servers: Servers, factor: float) -> Iterator[Line]:
    yield from steps(
        "tp", "a token, tp 2", servers.start("qwen2.5-7b", "2xl4", factor, "--tp", "2"), 1, 8
    )


def whole_of(server: Clocked, size: tuple[int, int]) -> float:
    """The table's milliseconds of a picture and the text beside it, and of a step."""
    rule = server.plan.model.image_rule
    assert rule is not None
    units = rule.units(*size, server.plan.promise.image_limit)
    return 1e3 * (server.table.image[units] + first_of(server, rule.unit_tokens(units) + 40))


#: A photograph, and a picture that keeps this card's tower busy for longer than a hang may last.
_PHOTOGRAPH, _LARGE = (1920, 1080), (3584, 3584)


def picture(servers: Servers, _: float) -> Iterator[Line]:
    """A picture alone, at several factors, and the gap that a photograph makes beside a stream."""
    for factor in (1.0, 2.0, 4.0):
        server = servers.start("internvl2-2b", "1xrtx3090", factor)
        pictures = [photograph(*_PHOTOGRAPH) for _ in range(8)]
        whole = whole_of(server, _PHOTOGRAPH)
        sent = asyncio.run(closed(server.url, 1, 6, pictures=pictures[:6], output=2))
        what = f"of a photograph, {factor:g} times slower"
        yield line_of(
            "picture", f"first token {what}", sent, table=whole, clock=1e3 * sent.first.p50
        )
        beside = asyncio.run(stream_beside(server.url, pictures[6:]))
        yield line_of(
            "picture", f"gap {what} beside a stream", beside,
            table=whole, clock=1e3 * median(beside.gaps),
        )  # fmt: skip
    for factor in (1.0, 4.0):
        server = servers.start("qwen2-vl-2b", "1xrtx4060ti", factor)
        sent = asyncio.run(closed(server.url, 1, 1, pictures=[photograph(*_LARGE)], output=2))
        yield line_of(
            "picture", f"first token of a picture of 3584x3584, {factor:g} times slower", sent,
            table=whole_of(server, _LARGE), clock=1e3 * sent.first.p50,
        )  # fmt: skip


#: First token and a token, p50 and p90 in ms, by requests sent a second, and requests answered a
#: second, which only a full batch shows: LMDeploy 0.4.0, Llama-3-8B on one RTX 3090, ShareGPT.
#: Source: zhjunqin/LLM-Learning, inference/benchmark/README.md.
PUBLISHED = {
    1: (69.06, 182.0, 22.4, 24.54), 5: (97.06, 230.58, 32.18, 44.24),
    8: (217.0, 516.0, 74.9, 94.2, 6.94),
}  # fmt: skip
_PAGE = ("first token p50", "first token p90", "a token p50", "a token p90", "answered")
#: Requests of a rate. Lengths: a lognormal distribution with these means and this sigma; at most.
_REQUESTS = {1: 60, 5: 300, 8: 600}
_MEANS, _SIGMA, _MOST = (199, 197), 0.9, 1024


def lengths(count: int) -> list[list[int]]:
    """Pairs of tokens of a prompt and an answer, always the same ones."""
    draw = random.Random(119)
    pairs = (
        [mean * draw.lognormvariate(-(_SIGMA**2) / 2, _SIGMA) for mean in _MEANS]
        for _ in range(count)
    )
    return [[max(4, min(_MOST, round(value))) for value in pair] for pair in pairs]


def page(servers: Servers, factor: float) -> Iterator[Line]:
    server = servers.start("llama-3.1-8b", "1xrtx3090", factor, "--max-batch-size", "128")
    for rate, published in PUBLISHED.items():
        sent = asyncio.run(poisson(server.url, rate, lengths(_REQUESTS[rate])))
        times = (sent.first.p50, sent.first.p90, sent.token.p50, sent.token.p90)
        found = (*(1e3 * one for one in times), sent.answered)
        for name, measured, clock in zip(_PAGE, published, found, strict=False):
            what = f"{rate} a second: {name}"
            yield line_of("page", what, sent, measured=measured, clock=clock)


#: Rows of LMDeploy's own table of Llama-2-7B on an A100 (bench/speed/rows.jsonl).
TABLES = [f"a100-v020-llama2-7b-b{n}-p{p}-o128" for n in (1, 16, 32, 64) for p in (128, 2048)]


def tables(servers: Servers, factor: float) -> Iterator[Line]:
    server = servers.start("llama-2-7b", "1xa100-80g", factor, "--max-batch-size", "128")
    rows = {row.id: row for row in read_rows()}
    for name in TABLES:
        row = rows[name]
        at_once, prompt, output = row.concurrency or 1, int(row.prompt), int(row.output)
        rounds = at_once * (1 if at_once >= 16 else 2)
        sent = asyncio.run(closed(server.url, at_once, rounds, prompt=prompt, output=output))
        told = formula_of(setup_of(row), rates()).requests_per_second * output
        yield line_of(
            "tables", name, sent, measured=row.output_tokens_per_second, formula=told,
            clock=sent.tokens_per_second,
        )  # fmt: skip


#: Loads that were measured on a card with LMDeploy 0.18 (bench/speed/images.jsonl).
RECORDS = (
    "h100-qwen2.5-vl-7b-c1", "h100-qwen2.5-vl-7b-c32", "h200-internvl2-8b-image-1",
    "h200-internvl2-8b-image-8", "h200-qwen2-vl-2b-image-1", "h200-qwen2-vl-2b-image-8",
)  # fmt: skip


def records(servers: Servers, factor: float) -> Iterator[Line]:
    rows = {row.id: row for row in read_rows()}
    server, there = None, None
    for row in map(rows.__getitem__, RECORDS):
        if there != (row.model, row.on) or server is None:
            there = (row.model, row.on)
            server = servers.start(*there, factor)
        ((width, height),), at_once = row.sizes, row.concurrency or 1
        load = LoadSpec.of(
            image_size=f"{width}x{height}", prompt_tokens=int(row.prompt), concurrency=at_once,
            output_tokens=int(row.output), requests=max(4, 3 * at_once), warm_up=at_once,
        )  # fmt: skip
        told = forecast_of(server.plan, load, at_once).requests_per_second
        line = line_of("records", row.id, None, formula=told, measured=row.requests_per_second)
        try:
            yield line._replace(clock=bench(server.url, load).requests_per_second)
        except UnservedError as error:
            yield line._replace(held_up=1.0, what=f"{row.id}: {error.message}")


_FIXED = ("--max-batch-size", "16", "--max-prefill-token-num", "4096")
#: Equal requests: clients, tokens of a prompt and of an answer.
QUEUES = ((16, 512, 128), (4, 2048, 128), (16, 2048, 128), (8, 1500, 64), (12, 3000, 64))


def queues(servers: Servers, factor: float) -> Iterator[Line]:
    """Prompts that meet: the formula beside LMDeploy's own scheduler, after each client's first."""
    server = servers.start("internvl2-2b", "1xrtx3090", factor, *_FIXED)
    for at_once, prompt, output in QUEUES:
        sent = asyncio.run(closed(server.url, at_once, 4 * at_once, prompt=prompt, output=output))
        load = LoadSpec.of(images=0, prompt_tokens=prompt, output_tokens=output)
        told = forecast_of(server.plan, load, at_once)
        found = {
            "tokens/s": (told.requests_per_second * output, sent.tokens_per_second),
            "first token": (1e3 * told.ttft, 1e3 * mean(sent.firsts[at_once:])),
            "a token": (1e3 * told.tpot, 1e3 * mean(sent.tokens[at_once:])),
        }
        for name, (formula, clock) in found.items():
            what = f"{at_once} at once, {prompt:,} and {output} tokens: {name}"
            yield line_of("queues", what, sent, formula=formula, clock=clock)


#: The rates of a card that is 40 % slower than its preset.
_SLOW = 0.6
#: Loads of the model that is timed on it, and of another one: requests at once, tokens of a prompt
#: and of an answer.
_CALIBRATED = {
    "internvl2-2b": ((1, 512, 128), (16, 512, 128), (16, 2048, 128)),
    "internvl2-8b": ((1, 512, 128), (16, 512, 128)),
}


def calibrated(servers: Servers, factor: float) -> Iterator[Line]:
    """A card that is slower than its preset: what its preset's plan says before and after.

    `calibrate` times the slow card's clock; a plan for the preset then forecasts by these steps,
    and the plan of another model by the rates that they show of the card.
    The load runs on the slow card, whose server knows no calibration.
    """
    machine = parse_spec("1xrtx3090")
    gpus = tuple(
        replace(gpu, memory_bandwidth=int(_SLOW * known(gpu.memory_bandwidth, 0)),
                dense_flops=int(_SLOW * known(gpu.dense_flops, 0)))
        for gpu in machine.gpus
    )  # fmt: skip
    slow = servers.folder / "slow.json"
    save_snapshot(replace(machine, gpus=gpus), slow)
    state = servers.folder / "calibrated"
    words = ("internvl2-2b", "--engine", "turbomind", "--pretend", *_FIXED)
    servers.end()
    child = start_turbofit(
        servers.children, state, "calibrate", *words, "--on", str(slow), "--clock", f"{factor:g}",
        "--json",
    )  # fmt: skip
    assert child.finish(900) == 0, child.stderr
    assert child.process.stdout is not None
    (learned,) = json.loads(child.process.stdout.read())["calibrations"]
    kept = msgspec.convert(learned, Calibration)
    options = {"max_batch_size": 16, "max_prefill_token_num": 4096, "engine": "turbomind"}
    for model, loads in _CALIBRATED.items():
        server = servers.start(model, str(slow), factor, *_FIXED)
        of_model = model in kept.model.lower()
        for point in kept.steps.points if kept.steps is not None and of_model else ():
            told = server.table.seconds(point)
            yield Line("calibrated", point.words, table=1e3 * told, clock=1e3 * point.seconds)
        before, after = (
            turbofit.plan(model, on=replace(machine, calibrations=given), **options)
            for given in ((), (kept,))
        )
        name = "" if of_model else f"{model} by the rates of another model, "
        for at_once, prompt, output in loads:
            sent = asyncio.run(
                closed(server.url, at_once, 3 * at_once, prompt=prompt, output=output)
            )
            load = LoadSpec.of(
                images=0, prompt_tokens=prompt, output_tokens=output, concurrency=at_once
            )
            for when, plan in (("before", before), ("after", after)):
                told = forecast_of(plan, load, at_once).requests_per_second * output
                yield line_of(
                    "calibrated", f"{name}{when}: {at_once} at once, {prompt} and {output} tokens",
                    sent, formula=told, clock=sent.tokens_per_second,
                )  # fmt: skip


def forms(servers: Servers, factor: float) -> Iterator[Line]:
    """Each form of client where images wait for each other, and where they do not."""
    for model, on, queue, slower in PLANS:
        for how, words in (("images wait", queue), ("no image waits", NO_QUEUE)):
            server = servers.start(model, on, slower * factor, *words, **SHORT)
            for form in FORMS:
                found = asyncio.run(given(server.url, form))
                what = f"{model} on {on}, {how}, {form}: requests/s, {found.refused} refused"
                line = line_of("forms", what, None, clock=found.rate)
                yield line._replace(held_up=found.held_up)


GROUPS = {
    "construction": construction, "tp": tensor_parallel, "picture": picture, "page": page,
    "tables": tables, "records": records, "queues": queues, "calibrated": calibrated,
    "forms": forms,
}  # fmt: skip


def run(names: list[str], factor: float) -> None:
    known = {name: list[str]() for name in GROUPS}
    for text in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        known[json.loads(text)["group"]].append(text)
    with tempfile.TemporaryDirectory(prefix="turbofit-bench-clock-") as folder:
        servers = Servers(Path(folder))
        for name in names:
            try:
                lines = []
                for line in GROUPS[name](servers, factor):
                    lines.append(json.dumps(line._asdict()))
                    print(lines[-1], flush=True)
                known[name] = lines
            finally:
                servers.end()
            RESULTS.write_text("".join(f"{text}\n" for one in known.values() for text in one))


def write() -> None:
    lines = [Line(**json.loads(text)) for text in RESULTS.read_text().splitlines()]
    head = "group | what | table | formula | measured | clock | beside | held up | load"
    rows = [
        (one.group, one.what, *map(_cell, (one.table, one.formula, one.measured, one.figure)),
         one.ratio, f"{one.held_up:.1%}", one.load)
        for name in GROUPS
        for one in lines
        if one.group == name
    ]  # fmt: skip
    before = PAGE.read_text().partition("\n## Figures")[0] if PAGE.exists() else "# The clock"
    text = f"{before.rstrip()}\n\n## Figures\n\n{ran_on('lmdeploy')}.\n\n"
    PAGE.write_text(f"{text}{table(head, rows, right='2345678')}\n")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def arguments(*, prog: str, description: str | None, names: Iterable[str]) -> argparse.Namespace:
    """Read the command line of a bench under the clock; ``names`` are the loads that it has."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=tuple(names), default=list(names))
    parser.add_argument("--clock", type=float, default=8.0)
    parser.add_argument("--write", action="store_true", help="only write RESULTS.md")
    return parser.parse_args()


def main() -> None:
    given = arguments(prog="python -m bench.clock", description=__doc__, names=GROUPS)
    if not given.write:
        run(given.only, given.clock)
    write()


if __name__ == "__main__":
    main()
