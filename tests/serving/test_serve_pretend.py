"""``turbofit serve --pretend`` end to end: LMDeploy's real server and engine, real deaths."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from bench.gateway.edge_values import BASE, COSTLY, PATHS
from tests.support.open_clients import OpenClient
from tests.support.processes import Child, gone, pids
from tests.support.serving import LONG, MESSAGES, Served, image, needs, serve_pretend, told
from tests.support.waiting import HANG, until
from turbofit.core.plan import Plan
from turbofit.measure.load import driver
from turbofit.measure.load.spec import LoadSpec
from turbofit.rehearsal.no_answer import SENTENCE
from turbofit.rehearsal.plan_clock import step_table
from turbofit.serving.engine.pretend_launch import PretendReader
from turbofit.serving.plan_gateway import bounds_of

pytestmark = [pytest.mark.lmdeploy]
needs("lmdeploy", "fastapi", "torchvision")

EIGHT = ("internvl2-8b", "--on", "1xrtx3090")
#: The largest image that a request may have, what is cut at a chunk's edge, and the smallest.
SIZES = [(4480, 2688), (448, 448), (5376, 448), (28, 28), (1344, 896), (800, 3000)]
CLIENTS, REQUESTS = 8, 24
#: Forwards take so many times the forecast's seconds: a load says so, and nobody waits much longer.
CLOCK = 1.1
CPU_TORCH = version("torch").endswith("+cpu")
#: Their trials take more than all others together. They end as those of shorter grammars do, and of
#: grammars with a dear token in `test_grammar_process`.
LONG_TRIALS = (
    "1,000 required properties", "maxLength 100,000", "64 optional properties",
    "pattern (.{1,99}){1,99}",
)  # fmt: skip


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the tests that kill nothing; the last of them ends it."""
    children: list[Child] = []
    words = ("--drain", "1", "--image-threads", "8", "--clock", f"{CLOCK}")
    more = ("--", "--tool-call-parser", "qwen2d5")
    served = serve_pretend(children, tmp_path_factory.mktemp("eight"), *EIGHT, *words, *more)
    served.wait()
    yield served
    for child in children:
        child.kill()


def test_a_picture_takes_the_forecasts_time_and_a_load_is_told_in_it(
    eight: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes first: nobody else's forwards are in the time."""
    before = eight.ask("/about")[2]
    said = before["clock"]["words"]
    assert said.startswith("time by forecast (")
    assert said.endswith(f"), {CLOCK} times slower than life")
    assert said in eight.child.stderr
    assert said in before["notices"]
    # The worst cases of the start took no time.
    assert before["clock"] == {**before["clock"], "busy": 0.0, "late": 0.0, "idle": 0.0}
    status, _, answer = eight.chat(image(896, 896), max_tokens=2)
    assert status == 200
    plan = Plan.from_json((eight.run / "plan.json").read_bytes())
    table, rule = step_table(plan, plan.engines[0]), plan.model.image_rule
    assert rule is not None
    prompt = answer["usage"]["prompt_tokens"]
    units = rule.units(896, 896, plan.promise.image_limit)
    least = table.image[units] + table.forward[prompt] + prompt**2 / 2 * table.pair
    busy = eight.ask("/about")[2]["clock"]["busy"]
    # Beside the prompt: one step, and one or two that LMDeploy prepares ahead.
    assert least + table.forward[1] <= busy <= least + 3 * (table.forward[1] + 0.001)
    monkeypatch.setattr(driver, "HELD_UP", float("inf"))  # whatever else runs on this host
    told: list[str] = []
    load = LoadSpec.of(images=0, concurrency=2, requests=4, output_tokens=4, warm_up=0)
    found = driver.bench(eight.url, load, say=told.append)
    assert (found.answered, found.forecast, found.warnings) == (4, said, ())
    assert found.ttft.p50 >= table.forward[1]
    assert told == [f"{said}: the load takes {CLOCK} times as long"]


def test_internvl2_at_its_planned_peak(eight: Served) -> None:
    """Said everywhere, brought to its planned peak before it opens, and not past it by a client.

    Nor by the images of many clients at once.
    """
    is_brought_to_its_planned_peak(eight, engines=1)
    assert " with turbomind\nfits: InternVL2-8B" in eight.child.stderr  # as `plan` begins
    assert "\nmargin 256 MiB: contexts and libraries are estimates" in eight.child.stderr
    status, headers, answer = eight.chat(image(4480, 4480, max_dynamic_patch=120))
    assert status == 200
    assert headers["x-turbofit-limited"].startswith("max_dynamic_patch=")
    assert headers["x-turbofit-pretend"] == "1"
    assert answer["usage"]["prompt_tokens"] < 13 * 256 + 300
    status, headers, answer = eight.chat(*[image(1792, 1344)] * 5)
    assert (status, headers["x-turbofit-limited"][:21]) == (200, "max_dynamic_patch=12-")
    assert 5 * 256 < answer["usage"]["prompt_tokens"] < 13 * 256 + 300
    log_probabilities_are_those_of_token_0(eight)
    until(lambda: first_tokens_are_told(eight.url), "the page of first tokens")
    what_meets_is_within_the_plan(eight)
    for pid in pids(eight.child):
        assert b"--api-keys" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    eight.clean()


def first_tokens_are_told(url: str) -> bool:
    with urlopen(f"{url}/metrics", timeout=HANG) as page:
        return b'turbofit_gateway_first_tokens_told{engine="0"} 1' in page.read()


VERSION = {"anthropic-version": "2023-06-01"}


def posted(served: Served, kind: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
    name = served.ask("/v1/models")[2]["data"][0]["id"]
    base = {key: name if key == "model" else value for key, value in BASE[kind].items()}
    return served.ask(PATHS[kind], {**base, **fields}, timeout=240, **VERSION)


@pytest.mark.parametrize("kind", ["chat", "completions", "generate", "responses"])
def test_no_top_k_ends_the_engine(eight: Served, kind: str) -> None:
    before = pids(eight.child)
    for top_k in (1025, 2**31, 2**40, 2**63):
        status, headers, _ = posted(eight, kind, top_k=top_k)
        assert (status, headers["x-turbofit-limited"]) == (200, f"top_k={top_k}->1024")
    assert posted(eight, kind)[0] == 200
    assert pids(eight.child) == before


@pytest.mark.parametrize(
    ("kind", "fields", "status"),
    [
        ("chat", {"seed": -1}, 200),
        ("chat", {"seed": 2**64}, 200),
        ("chat", {"min_new_tokens": 2**31}, 200),
        ("generate", {"stop_token_ids": [-1]}, 400),
        ("generate", {"prompt": None, "input_ids": [-1]}, 400),
        ("completions", {"prompt": ""}, 400),
        ("completions", {"logprobs": 1}, 400),
    ],
)
def test_what_was_an_answer_500(eight: Served, kind: str, fields: Any, status: int) -> None:
    given, _, answer = posted(eight, kind, **fields)
    assert given == status, answer


@pytest.mark.parametrize("kind", ["chat", "completions", "messages", "responses"])
def test_lmdeploys_own_errors_have_the_form_of_the_api(eight: Served, kind: str) -> None:
    texts = {"messages": [], "prompt": "", "input": []}
    for wrong in (
        {"model": None},
        {name: text for name, text in texts.items() if name in BASE[kind]},
    ):
        if kind == "responses" and "model" in wrong:
            continue  # which needs none
        body = {**BASE[kind], "model": eight.ask("/v1/models")[2]["data"][0]["id"], **wrong}
        status, headers, answer = eight.ask(PATHS[kind], body, timeout=240, **VERSION)
        assert (status, headers["content-type"]) == (400, "application/json")
        assert {"message", "type"} <= set(answer["error"])
        assert answer.get("type") == ("error" if kind == "messages" else None)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_what_clients_write_is_in_no_log(eight: Served, kind: str) -> None:
    """LMDeploy's tokenizer warns of stop words of several tokens, with the words and tokens."""
    assert posted(eight, kind, stop=[f"MARK {kind} Jane Doe"], max_tokens=1)[0] == 200
    log = eight.run / "engine-0.log"
    until(lambda: "stop word" in log.read_text(), "LMDeploy's warning")
    assert not [path for path in eight.run.glob("*.log*") if "MARK" in path.read_text()]


@pytest.mark.skipif(find_spec("xgrammar") is None, reason="no xgrammar")
def test_a_grammar_is_tried_and_the_engine_compiles_it_on_a_thread(eight: Served) -> None:
    forms = {text: {"type": "regex_schema", "regex_schema": text} for text in ("[a-z]{9}", "(")}

    def asked(form: Any) -> Any:
        """The answer; on a busy host the trial may take longer than a request waits for it."""
        answer = posted(eight, "chat", response_format=form)
        return answer if answer[0] != 503 else None

    answers = {text: until(lambda f=form: asked(f), "a trial") for text, form in forms.items()}
    assert [status for status, _, _ in answers.values()] == [200, 400]
    assert "cannot be compiled: Regex parsing error" in answers["("][2]["error"]["message"]
    assert "grammars: LMDeploy's own way" not in (eight.run / "engine-0.log").read_text()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LONG_TRIALS)) for name in COSTLY],
)
def test_what_costs_much_is_answered_or_refused(eight: Served, name: str) -> None:
    assert posted(eight, "chat", **COSTLY[name])[0] in (200, 400, 413)
    assert posted(eight, "chat")[0] == 200


def test_the_drain_ends_with_a_word_to_all(eight: Served) -> None:
    the_drain_ends_with_a_word_to_everybody(eight)
    assert all(gone(pid) for pid in pids(eight.child))
    assert eight.record["state"] == "ended"
    assert not (eight.run / "model").exists()


def is_brought_to_its_planned_peak(served: Served, engines: int) -> None:
    served.child.wait_for("phase: ready", engines)
    served.child.wait_for("images: prepared on ", engines)
    assert "PRETEND GPUs" in served.child.lines[0]
    status, headers, health = served.ask("/health")
    assert (status, headers["x-turbofit-pretend"], health["pretend"]) == (200, "1", True)
    record = served.record
    assert record["pretend"] is True
    assert record["state"] == "ready"
    found = record["attempts"][0]["engines"]
    assert len(found) == engines
    for engine in found:
        rows = {row["what"]: row for row in engine["beside"]}
        peak = rows["in use at most"]
        tokens = rows["KV tokens"]
        if CPU_TORCH:
            assert 0.999 <= peak["actual"] / peak["forecast"] <= 1.0
            assert tokens["actual"] == tokens["forecast"]
        else:  # torch's own kernels are on the pretend card, beside those that the plan counts
            assert 0.98 <= peak["actual"] / peak["forecast"] <= 1.0
            assert 0.96 <= tokens["actual"] / tokens["forecast"] <= 1.0
        assert {"starting", "weights", "cache", "serving", "check"} <= set(engine["seconds"])


def what_meets_is_within_the_plan(served: Served) -> None:
    """With images of many clients at once, of all sizes, between prompts of many lengths."""
    plan = Plan.from_json((served.run / "plan.json").read_bytes())
    bounds, memory = bounds_of(plan), plan.host
    if memory.available is not None:  # images in flight have a bound of their own
        assert memory.pinned + memory.pageable + bounds.host_bytes <= memory.available

    def ask(number: int) -> int:
        many = 1 + number % 3
        sizes = itertools.islice(itertools.cycle(SIZES), number, number + many)
        text = {"type": "text", "text": "x" * (number * 61 % 700)}
        return served.chat(text, *(image(*size) for size in sizes), max_tokens=4)[0]

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(ask, range(REQUESTS)))
    assert set(answers) <= {200, 429}  # a slow host keeps some waiting for too long
    assert answers.count(200) > CLIENTS
    assert served.chat()[0] == 200
    log = (served.run / "engine-0.log").read_text(errors="replace")
    assert "turbofit: images: prepared on 8 threads" in log
    met = [int(units) for units in re.findall(r"images_batched=\d+ .* patches=(\d+)", log)]
    assert max(met) <= plan.engines[0].units_per_forward

    machine = served.run / "pretend-0" / "0-0"
    (usage,), (ledger,) = PretendReader(plan, 0, machine).usages(), plan.ledgers
    assert usage.peak <= ledger.most


def the_drain_ends_with_a_word_to_everybody(served: Served) -> None:
    before = {log: log.stat().st_size for log in served.run.glob("*.log*")}
    model = served.ask("/v1/models")[2]["data"][0]["id"]
    opened = served.streams(model)
    body = {"model": model, "messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True}
    whole = OpenClient(served.url, "/v1/chat/completions", body)
    half = OpenClient(served.url, "/v1/chat/completions", body, sent=0.5)
    for _ in range(2):  # connections are taken in turn: both are the gateway's by then
        assert served.ask("/health")[0] == 200
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0
    assert all(told(path, client) for path, client in opened.items())
    assert whole.answer()[0] in (200, 503)
    assert half.answer()[0] == 503
    cut = int(served.child.lines[-1].removeprefix("ended: ").partition(" ")[0])
    assert 4 <= cut <= 5
    served.clean(before)
    records = [json.loads(line) for line in (served.run / "access.log").read_text().splitlines()]
    assert sum(record["refused"] == "ending" for record in records) == cut


def log_probabilities_are_those_of_token_0(served: Served) -> None:
    """On real GPUs the kernel counts the token that it chose; the pretend one did not."""
    for parts in ((), (image(448, 448),)):
        status, _, answer = served.chat(*parts, logprobs=True, top_logprobs=5)
        assert status == 200
        tokens = answer["choices"][0]["logprobs"]["content"]
        assert len(tokens) == answer["usage"]["completion_tokens"]
        assert {one["logprob"] for one in tokens} == {0.0}
    body = {"prompt": "hi", "max_tokens": 3, "return_logprob": True, "top_logprobs_num": 2}
    status, _, answer = served.ask("/generate", body)
    assert status == 200
    said = [[0.0, ord(letter)] for letter in SENTENCE[:3]]
    assert answer["meta_info"]["output_token_logprobs"] == said
