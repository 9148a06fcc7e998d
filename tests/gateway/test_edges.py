"""What killed the real engine, or made it answer 500, through the gateway; one engine for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.gateway.edge_values import BASE, COSTLY, PATHS, edges
from tests.support.processes import Child, pids
from tests.support.serving import Served, needs, serve_pretend
from turbofit.gateway.limits.rules import IntegerRule, Scope

pytestmark = [pytest.mark.lmdeploy]
needs("fastapi", "torchvision")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    children: list[Child] = []
    words = ("qwen2.5-0.5b", "--on", "1xrtx3090", "--context", "256")
    server = serve_pretend(children, tmp_path_factory.mktemp("edges"), *words)
    try:
        server.wait()
        yield server
    finally:
        for child in children:
            child.kill()


def ask(served: Served, kind: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
    name = served.ask("/v1/models")[2]["data"][0]["id"]
    base = {key: name if key == "model" else value for key, value in BASE[kind].items()}
    return served.ask(PATHS[kind], {**base, **fields}, timeout=240)


@pytest.mark.parametrize("kind", ["chat", "completions", "generate", "responses"])
def test_no_top_k_ends_the_engine(served: Served, kind: str) -> None:
    before = pids(served.child)
    for top_k in (1025, 2**31, 2**40, 2**63):
        status, headers, _ = ask(served, kind, top_k=top_k)
        assert status == 200
        assert headers["x-turbofit-limited"] == f"top_k={top_k}->1024"
    assert ask(served, kind)[0] == 200
    assert pids(served.child) == before


@pytest.mark.parametrize(
    ("kind", "fields", "status"),
    [
        ("chat", {"seed": -1}, 200),
        ("chat", {"seed": 2**64}, 200),
        ("completions", {"seed": 10**30}, 200),
        ("chat", {"min_new_tokens": 2**31}, 200),
        ("chat", {"max_tokens": 64000}, 200),
        ("responses", {"max_output_tokens": 2**63}, 200),
        ("generate", {"stop_token_ids": [-1]}, 400),
        ("generate", {"prompt": None, "input_ids": [-1]}, 400),
        ("generate", {"prompt": None, "input_ids": [10**9]}, 400),
        ("completions", {"prompt": ""}, 400),
        ("completions", {"min_p": 2}, 400),
        ("completions", {"logprobs": 1}, 400),
        ("responses", {"text": {"format": {"type": "json_schema", "schema": 5}}}, 400),
    ],
)
def test_what_was_an_answer_500(served: Served, kind: str, fields: Any, status: int) -> None:
    given, _, answer = ask(served, kind, **fields)
    assert given == status, answer


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_much_is_answered_or_refused(served: Served, name: str) -> None:
    assert ask(served, "chat", **COSTLY[name])[0] in (200, 400, 413)
    assert ask(served, "chat")[0] == 200


def test_the_bench_tries_both_sides_of_a_range() -> None:
    tried = dict(edges(IntegerRule(least=1, most="session"), Scope(session=256)))
    assert [tried[name] for name in ("least", "least-1", "most", "most+1")] == [1, 0, 256, 257]
