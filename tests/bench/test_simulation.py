"""A thousand simulated days without a violation, equal seeds with equal days, and planted bugs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

pytest.importorskip("aiohttp")

from bench.simulation import plans
from bench.simulation.planted import BUGS, Bug, tried
from bench.simulation.scenario import simulate
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.gateway.routing.admission import Admission

PACKAGE = Path(__file__).parents[2] / "turbofit"
DAYS, BATCH = 1000, 100


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, DAYS, BATCH))
def test_nothing_breaks_in_simulated_days(first: int) -> None:
    broken = {}
    for seed in range(first, first + BATCH):
        result = simulate(seed)
        assert sum(n for name, n in result.counts.items() if name.startswith("fault ")) >= 20
        if result.violations:
            broken[seed] = result.violations
    assert broken == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug", [bug for bug in BUGS if bug.seed is not None], ids=lambda bug: bug.name
)
def test_a_day_shows_a_bug_and_is_well_without_it(bug: Bug) -> None:
    seed = bug.seed
    assert seed is not None
    found, what, _ = tried(bug, range(seed, seed + 1), 1)
    assert found == seed, what
    assert simulate(seed).violations == []


@pytest.mark.parametrize(("seed", "has"), [(3, None), (10, None), (130, "batch"), (1, "learned")])
def test_equal_seeds_have_equal_histories(seed: int, has: str | None) -> None:
    one, two = simulate(seed), simulate(seed)
    assert one.log == two.log
    assert one.digest == two.digest != simulate(4).digest
    for word in ("batch", "learned"):
        assert any(f" {word} " in line for line in one.log) == (word == has)


def test_a_history_does_not_depend_on_plans_that_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate(3)
    remembered = simulate(3).digest
    monkeypatch.setattr(plans, "_PLANS", {})
    assert simulate(3).digest == remembered


def test_what_one_worker_found_no_other_searches_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plans, "_SHARED", [])
    monkeypatch.setattr(plans, "_PLANS", {})
    monkeypatch.setattr(plans, "_SEARCHED_AGAIN", 1_000_000)
    plans.make_store(tmp_path / "plans.sqlite")
    plans.share(tmp_path / "plans.sqlite")
    one = simulate(130)
    assert any(isinstance(found, TurbofitError) for found in plans._PLANS.values())
    monkeypatch.setattr(plans, "_PLANS", {})
    monkeypatch.setattr(plans, "_found", None)
    assert simulate(130).log == one.log


def test_a_remembered_plan_is_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_SEARCHED_AGAIN", 1)
    assert simulate(3).violations == []
    wrong = {
        key: replace(one, verdict="another") if isinstance(one, Plan) else one
        for key, one in plans._PLANS.items()
    }
    monkeypatch.setattr(plans, "_PLANS", wrong)
    assert "a remembered plan is not what a search finds" in simulate(3).violations


def test_a_bug_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that is given back twice."""
    release = Admission.release

    def twice(self: Admission, engine: object, cost: SimpleNamespace) -> None:
        release(self, engine, cost)  # type: ignore[arg-type]
        release(self, engine, cost)  # type: ignore[arg-type]

    monkeypatch.setattr(Admission, "release", twice)
    violations = [text for seed in range(3) for text in simulate(seed).violations]
    assert any("is held though no request is open" in text for text in violations)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    assert (PACKAGE / bug.file).read_text().count(bug.old) == 1
    assert bug.old != bug.new
