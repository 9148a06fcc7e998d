from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.pretend.scenario import PretendGpu
from turbofit.rehearse.document import moments, outcome_and_end
from turbofit.rehearse.run import Seen


def card(**phases: tuple[int, int]) -> dict[str, dict[str, Any]]:
    spans = {name.replace("_", " ", 1): span for name, span in phases.items()}
    return {name: {"peak": peak, "held": held} for name, (peak, held) in spans.items()}


def test_what_is_charged_to_a_card_is_in_use_when_the_account_says_so() -> None:
    held = card(weights=(90, 80), cache=(180, 180), case_vision_request=(190, 185))
    seen = moments([held], [PretendGpu("x", 2000, used=1000, late=50)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [
        ("weights", (1090,), (1080,)),
        ("cache", (1230,), (1230,)),  # the question how much is free came first
        ("case vision_request", (1240,), (1235,)),
    ]
    assert [one.image for one in seen] == [False, False, True]


def test_a_card_without_a_phase_stays_as_it_was() -> None:
    first = card(weights=(90, 80), cache=(180, 180), ready=(180, 180))
    second = card(weights=(70, 60), ready=(160, 150))
    seen = moments([first, second], [PretendGpu("x", 2000)] * 2)
    assert [one.phase for one in seen] == ["weights", "cache", "ready"]
    assert [one.peak for one in seen] == [(90, 70), (180, 60), (180, 160)]
    assert [one.end for one in seen] == [(80, 60), (180, 60), (180, 150)]


def test_a_start_that_died_ends_where_it_died() -> None:
    seen = moments([card(**{"import": (0, 0)})], [PretendGpu("x", 2000, used=7)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [("import", (7,), (7,))]


def ended(code: int = 0, stopped: str = "", **told: Any) -> Any:
    return SimpleNamespace(notes=told, ran=SimpleNamespace(code=code), stopped=stopped)


def seen(refused: dict[str, Any] | None = None) -> Seen:
    return Seen([], [], {}, [], refused, phase="context", where="Check failed")


def case(**statuses: int) -> dict[str, Any]:
    return {"name": "a", "statuses": statuses}


@pytest.mark.parametrize(
    ("run", "outcome", "where"),
    [
        (ended(done=True, cases=[case(finished=3)]), "served", None),
        # A prompt that the engine refuses is an answer, too.
        (ended(done=True, cases=[case(too_long=1)]), "served", None),
        (ended(-9, "stuck"), "hang", "Check failed"),
        (ended(-9, "idle"), "hang", "nothing happened any more"),
        (ended(done=True, cases=[case(**{"not finished": 1})]), "hang", "not finished in time"),
        (ended(done=True, cases=[case(unavailable=1)]), "failed", "Check failed"),
        (ended(1, error={"type": "AssertionError"}), "failed", "Check failed"),
        (ended(-6), "failed", "Check failed"),
    ],
)
def test_how_it_ended(run: Any, outcome: str, where: str | None) -> None:
    found, end = outcome_and_end(run, seen())
    assert found == outcome
    assert (end.where if end else None) == where


def test_an_end_after_a_refused_allocation_is_out_of_memory() -> None:
    refused = {
        "phase": "warm-up",
        "where": "Attn",
        "asked": 9,
        "left": 4,
        "missing": 5,
        "pool": "x",
    }
    outcome, end = outcome_and_end(ended(-6), seen(refused))
    assert outcome == "out_of_memory"
    assert end is not None
    assert (end.kind, end.phase, end.where, end.missing) == ("out_of_memory", "warm-up", "Attn", 5)
    # TurboMind's silent hang refuses nothing that matters.
    assert outcome_and_end(ended(-9, "stuck"), seen(refused))[0] == "hang"
