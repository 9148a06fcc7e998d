"""Simulated days without a violation, and planted bugs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from bench.simulation.planted import BUGS, Bug, tried
from bench.simulation.scenario import simulate
from tests.sweep import part, sweep
from turbofit.gateway.routing.admission import Place

PACKAGE = Path(__file__).parents[2] / "turbofit"
BATCH = 6
day = cache(simulate)


@pytest.mark.slow
@pytest.mark.parametrize("first", sweep(range(0, 48 * BATCH, BATCH), 48))
def test_nothing_breaks_in_simulated_days(first: int) -> None:
    broken = {}
    for seed in range(first, first + part(BATCH, 4)):
        result = day(seed)
        assert sum(n for name, n in result.counts.items() if name.startswith("fault ")) >= 20
        if result.violations:
            broken[seed] = result.violations
    assert broken == {}


@pytest.mark.slow
def test_equal_seeds_have_equal_histories_whatever_plans_are_remembered() -> None:
    one, two = day(0), simulate(0)  # the second finds plans that the first has made
    assert one.log == two.log
    assert one.digest == two.digest != day(1).digest


def test_a_bug_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that is given back as often as somebody asks."""

    def again(self: Place) -> None:
        self.engine.host_bytes -= self.cost.host_bytes

    monkeypatch.setattr(Place, "_give_back_host", again)
    violations = (text for seed in range(3) for text in simulate(seed).violations)
    assert any("is held though no request is open" in text for text in violations)


@pytest.mark.exhaustive
def test_a_planted_bug_is_found() -> None:
    (bug,) = [one for one in BUGS if one.name == "who is refused is let through"]
    found, what, _ = tried(bug, range(100), 1)
    assert found is not None, what


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    assert (PACKAGE / bug.file).read_text().count(bug.old) == 1
    assert bug.old != bug.new
