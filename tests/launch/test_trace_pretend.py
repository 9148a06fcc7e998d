"""A trace by the forecast, and sent to LMDeploy's real server on a pretend GPU."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

from tests.support.processes import Child
from tests.support.serving import needs, serve_pretend, start_turbofit
from turbofit import api
from turbofit.load.prompt import PromptWriter
from turbofit.load.trace import TracedRequest, read_trace
from turbofit.load.trace_forecast import admitted_requests, simulated_engines
from turbofit.tuner.trace import replay

pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]
needs("fastapi", "torchvision")

PLANNED: Final[dict[str, Any]] = {"engine": "turbomind", "context": 4096, "concurrency": 4}
#: Tokens of answers, four of which are written at once: the others come while those are written.
QUEUED: Final = (1710, 1120, 1880, 730, 90, 130, 120, 80, 410, 580, 430, 310)
#: Seconds of the forecast, some 300 steps: ends that are as far apart have one order at any speed,
#: however late a client's requests are.
APART: Final = 1.0
#: Tokens of text, images, and tokens of an answer.
MIXED: Final = (
    (100, "448x448", 10), (200, "1344x896", 11), (400, "448x448 448x448", 12),
    (100, "4480x4480", 13), (60, "800x3000", 14), (300, "1792x1344 " * 3, 15),
    (150, "1792x1344 " * 10, 16), (200, "640x480 " * 8, 17), (3000, "448x448 " * 3, 18),
    (3400, "", 600), (3000, "448x448 " * 5, 19), (4300, "", 20), (9000, "", 21),
    (100, "448x448 " * 14, 22), (100, "448x448 " * 40, 23), (600, "300x300 " * 4, 24),
    (90, "28x28", 25), (2000, "1000x1000", 26),
)  # fmt: skip
#: Bytes of a word that `bench` draws, at least: the stand-in's tokenizer takes each for a token.
OF_WORD: Final = 4
#: Tokens of a chat template, at most.
ABOUT: Final = 40


def as_counted(trace: Path) -> list[TracedRequest]:
    """A trace of words, with the tokens that the stand-in's tokenizer makes of them."""
    writer, requests = PromptWriter("", 0), read_trace(f"{trace}")
    counted = []
    for request in requests:
        content = writer.body(request)["messages"][0]["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        size = sum(len(part.get("text", "").encode()) for part in parts)
        counted.append(replace(request, prompt_tokens=size))
    return counted


def test_a_replay_has_the_order_the_refusals_and_the_tokens_of_the_forecast(
    children: list[Child], tmp_path: Path
) -> None:
    trace, recorded = tmp_path / "trace.csv", tmp_path / "recorded.jsonl"
    rows = [(n * 0.15, 200 // OF_WORD, "", output) for n, output in enumerate(QUEUED)]
    rows += [(n * 0.05 + 2, tokens // OF_WORD, *row) for n, (tokens, *row) in enumerate(MIXED)]
    trace.write_text("".join(f"{','.join(map(str, row))}\n" for row in rows))
    plan = api.plan("internvl2-1b", on="1xrtx3090", **PLANNED)
    requests, refused, lowered = admitted_requests(plan, as_counted(trace))
    times, _ = replay(list(simulated_engines(plan)), requests, queue=64, patience=600.0)
    ends = list(zip(QUEUED, times.ended, strict=False))
    decided = [(one, other) for one, end in ends for other, later in ends if later - end > APART]
    inverted = [pair for pair in decided if QUEUED.index(pair[0]) > QUEUED.index(pair[1])]
    assert len(inverted) >= 10

    words = [word for name, value in PLANNED.items() for word in (f"--{name}", f"{value}")]
    served = serve_pretend(
        children, tmp_path / "state", "internvl2-1b", "--on", "1xrtx3090", *words,
        "--record-trace", f"{recorded}",
    )  # fmt: skip
    served.wait()
    load = start_turbofit(
        children, tmp_path / "load", "bench", served.url, "--trace", f"{trace}", "--json"
    )
    assert load.process.stdout is not None
    measured = json.loads(load.process.stdout.read())
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0

    outputs = [json.loads(line)["output_tokens"] for line in recorded.read_text().splitlines()]
    assert [pair for pair in decided if outputs.index(pair[0]) > outputs.index(pair[1])] == []
    access = (served.run / "access.log").read_text()
    lines = [json.loads(line) for line in access.splitlines()]
    reasons = Counter(one["refused"] for one in lines if one["status"] == 400)
    # What LMDeploy itself refuses here are prompts that are too long.
    reasons["prompt_too_long"] += reasons.pop("engine_refused")
    assert reasons == refused
    assert (measured["begun"], measured["answered"]) == (len(rows), len(requests))
    asked = {row[-1] for row in rows}
    cut = [tokens for tokens in outputs if tokens not in asked | {1}]
    assert len(cut) + sum(bool(one["limited"]) for one in lines) == lowered
    (left,) = (one.output for one in requests if one.output not in asked)
    assert cut == [pytest.approx(left, abs=ABOUT)]
    prompts, answers = (sum(sizes) for sizes in zip(*(one[1:3] for one in requests), strict=True))
    more = measured["prompt_tokens"] - prompts / len(requests)
    assert 0 < more < ABOUT
    assert measured["output_tokens"] * len(requests) == pytest.approx(answers, abs=ABOUT)
