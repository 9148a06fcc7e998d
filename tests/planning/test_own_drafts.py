"""What a plan says of a draft that is layers of the model's own checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import turbofit
from tests.memory.pytorch.test_own_drafts import QWEN, drafted, planned
from tests.support.plans import few_presets
from turbofit import api
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB
from turbofit.planning.own_drafts import draft_warnings
from turbofit.serving.cluster.actors import cluster_from


@pytest.mark.parametrize("on", ["2xh100", "2xa100-80g"])
def test_lmdeploys_own_example(on: str) -> None:
    """Its pull request #4437 shows this line: it is to start."""
    prediction = turbofit.predict(
        "qwen3.5-35b-a3b", on=on, tp=2, engine="pytorch", max_batch_size=128, session_len=65536,
        speculative_algorithm=QWEN, speculative_num_draft_tokens=3,
    )  # fmt: skip
    assert prediction.fits
    assert "counted, not rehearsed" in prediction.warnings[0]


def test_a_plan_says_how_many_requests_each_number_of_tokens_leaves() -> None:
    plan = planned("qwen3.5-9b", "1xa100-40g", speculative_num_draft_tokens=2)
    (row,) = (reason for reason in plan.reasons if reason.startswith("drafts: "))
    told = row.removeprefix("drafts: ").partition(" requests")[0]
    counts = [int(count) for count in told.split(", ")]
    assert len(counts) == 4
    assert counts == sorted(counts, reverse=True)
    assert counts[2] == plan.requests_at_once
    assert "turbomind" in row
    engine = plan.engines[0]
    assert engine.command is not None
    assert "--speculative-draft-model" not in engine.command.argv
    assert engine.speculative_config() == {"method": QWEN, "num_speculative_tokens": 2}
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("name", "on", "options"),
    [
        ("qwen3.5-9b", "1xa100-40g", {"least": True}),
        ("qwen3.5-9b", "1xa100-80g", {"budget": "40GiB"}),
        ("qwen3.5-9b", "1xa100-40g+1xh100", {"images": 0}),
        ("qwen3.5-9b", "1xh100:free=40GiB", {"goal": "context"}),
        ("qwen3.5-27b-fp8", "2xl40s", {"tp": 2, "eager_mode": True}),
        ("glm-4.5-air", "4xh100", {"goal": "latency"}),
        ("glm-4.6", "8xh200", {}),
    ],
)
def test_whatever_is_planned_is_doubted(name: str, on: str, options: dict[str, Any]) -> None:
    plan = planned(name, on, **options)
    assert plan.fits
    assert "counted, not rehearsed" in plan.warnings[0]
    assert all(ledger.headroom >= ledger.margin >= GIB for ledger in plan.ledgers)


def test_a_cluster_and_which_say_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"images": 0, "speculative_algorithm": QWEN}
    nodes = cluster_from("sim:1xa100-40g/1xh100")
    cluster = api.plan_cluster("qwen3.5-9b", nodes, **options)
    assert "counted, not rehearsed" in cluster.warnings[0]
    few_presets(monkeypatch, ["a100-40g"])
    (row,) = turbofit.which("qwen3.5-9b", **options).keep
    assert "counted, not rehearsed" in row.warnings[0]


def test_a_given_margin_stays() -> None:
    plan = planned("qwen3.5-9b", "1xrtx4090", margin=300 * MIB)
    assert plan.ledgers[0].margin == 300 * MIB


@pytest.mark.parametrize(("outcome", "warns"), [(None, 1), ("failed", 1), ("served", 0)])
def test_a_rehearsal_that_served_ends_the_doubt(outcome: str | None, warns: int) -> None:
    rehearsal = outcome and SimpleNamespace(outcome=outcome)
    plan: Any = SimpleNamespace(model=drafted("glm-4.5-air")[0], rehearsal=rehearsal)
    assert len(draft_warnings(plan)) == warns
