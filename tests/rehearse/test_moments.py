from __future__ import annotations

from typing import Any

from turbofit.pretend.scenario import PretendGpu
from turbofit.rehearse.moments import moments, torch_moments
from turbofit.rehearse.turbomind.ledger import RehearsedGpu


def card(**phases: tuple[int, int]) -> RehearsedGpu:
    spans = {name.replace("_", " ", 1): span for name, span in phases.items()}
    return RehearsedGpu(
        peak={name: peak for name, (peak, _) in spans.items()},
        end={name: end for name, (_, end) in spans.items()},
    )


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
    seen = moments([RehearsedGpu(end={"import": 0})], [PretendGpu("x", 2000, used=7)])
    assert [(one.phase, one.peak, one.end) for one in seen] == [("import", (7,), (7,))]


def test_torch_engines() -> None:
    spans: dict[str, Any] = {
        "build": {"peak": 400, "held": 300},
        "cache": {"peak": 900, "held": 900},
        "case vision": {"peak": 990, "held": 950},
    }
    document = {"gpus": [{"phases": spans}]}
    gpu = PretendGpu(name="card", total=2000, used=100, late=10)
    seen = torch_moments(document, [gpu])
    assert [one.peak for one in seen] == [(500,), (1010,), (1100,)]
    assert seen[-1].end == (1060,)
    assert seen[-1].image
