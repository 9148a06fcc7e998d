"""Simulated days without a violation, planted bugs, and the soak's verdict."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.simulation import substitutes
from bench.simulation.planted import BUGS, Bug, tried
from bench.simulation.scenario import simulate
from bench.soak.samples import TOLERANCES, Sample, taken, verdict
from bench.soak.served import running
from tests.sweep import sweep
from turbofit.core.units import MIB
from turbofit.gateway.routing.admission import Place

PACKAGE = Path(__file__).parents[2] / "turbofit"
BATCH = 6


@pytest.mark.slow
@pytest.mark.parametrize("first", sweep(range(0, 48 * BATCH, BATCH), 48))
def test_nothing_breaks_in_simulated_days(first: int) -> None:
    broken = {}
    for seed in range(first, first + BATCH):
        result = simulate(seed)
        assert sum(n for name, n in result.counts.items() if name.startswith("fault ")) >= 20
        if result.violations:
            broken[seed] = result.violations
    assert broken == {}


@pytest.mark.slow
def test_equal_seeds_have_equal_histories_whatever_plans_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(substitutes, "_PLANS", {})
    one, two = simulate(3), simulate(3)  # the second finds plans that the first has made
    assert one.log == two.log
    assert one.digest == two.digest != simulate(4).digest


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


def samples(**growing):
    """A hundred of them; a figure that grows has so much more in each."""
    figures = {"memory": 60 * MIB, "descriptors": 20, "connections": 5, "threads": 6,
               "disk": 1000, "processor": 0}  # fmt: skip
    step = {"disk": 4000, "processor": 30, **growing}
    return [
        Sample(
            at=float(number), requests=number * 10, faults=0,
            added=tuple(1.0 + one / 10 + growing.get("added", 0) * number for one in range(5)),
            **{name: value + step.get(name, 0) * number for name, value in figures.items()},
        )
        for number in range(100)
    ]  # fmt: skip


def test_what_stays_is_flat() -> None:
    assert [(one.what, one.flat) for one in verdict(samples())] == [(n, True) for n in TOLERANCES]
    # A folder may grow by request.
    assert all(one.flat for one in verdict(samples(disk=20_000)))
    with pytest.raises(ValueError, match="too few"):
        verdict(samples()[:9])


def faster(name):
    """A figure that grows faster than by request."""
    return [one._replace(**{name: number**3}) for number, one in enumerate(samples())]


@pytest.mark.parametrize(
    ("grown", "named"),
    [
        (samples(memory=MIB), {"memory"}),
        (samples(descriptors=1), {"descriptors"}),
        (samples(threads=0.2), {"threads"}),
        (samples(added=0.5), {"added p50", "added p90"}),
        (faster("disk"), {"disk"}),
        (faster("processor"), {"processor time"}),
    ],
    ids=["memory", "descriptors", "threads", "added", "disk", "processor"],
)
def test_what_grows_is_named(grown, named) -> None:
    assert {one.what for one in verdict(grown) if not one.flat} == named


def test_a_process_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "engine-0.log").write_bytes(b"x" * 100)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before = taken(os.getpid(), port, tmp_path)
        with (tmp_path / "engine-0.log").open():
            after = taken(os.getpid(), port, tmp_path)
    assert after["descriptors"] == before["descriptors"] + 1
    assert before["disk"] == 100
    assert 0 < before["processor"] <= after["processor"]
    assert before.pop("connections") == 0
    assert min(before.values()) > 0


def test_a_process_that_got_an_engines_number_is_none(tmp_path: Path) -> None:
    """A soak read a stranger's command line, and ended; it would have killed that process."""
    program = [sys.executable, "-c", "print(flush=True); input()"]
    environ = {**os.environ, "TURBOFIT_LEASES": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env=environ, stdin=pipe, stdout=pipe) as engine:
        assert engine.stdout is not None
        engine.stdout.readline()  # it has its own environment from now on
        numbers = (os.getpid(), engine.pid)
        child = SimpleNamespace(lines=[f"engine 0 (process {pid}, port 1)" for pid in numbers])
        assert running(child, tmp_path) == [engine.pid]
        engine.communicate(b"\n")
    assert running(child, tmp_path) == []
