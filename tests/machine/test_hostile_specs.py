"""Whatever a person types: a machine, size, device map or option, or an error with a hint."""

from __future__ import annotations

from typing import Any

from tests.hostile import hostile
from turbofit.core.errors import UsageError
from turbofit.core.units import parse_bytes
from turbofit.machine.snapshot import check_possible
from turbofit.machine.spec import MAX_GPUS, parse_spec
from turbofit.planning.commands import read_map
from turbofit.planning.request import PlanRequest

OPTIONS = ("image_size", "margin", "budget", "context", "tp", "replicas", "gpus", "images")


@hostile("specs")
def test_a_text_is_refused_or_what_it_means_is_possible(data: bytes) -> None:
    kind, text = data[:1], data[1:].decode("utf-8", "replace")
    number = kind[0] if kind else 0
    try:
        if number % 4 == 0:
            machine = parse_spec(text)
            assert 1 <= len(machine.gpus) <= MAX_GPUS
            check_possible(machine, "the machine")
        elif number % 4 == 1:
            assert parse_bytes(text, what="a size") >= 0
        elif number % 4 == 2:
            read_map("{" + text)
        else:
            option = OPTIONS[number // 4 % len(OPTIONS)]
            values: dict[str, Any] = {"model": "m", "on": "rtx3090", option: text}
            PlanRequest.of_options(values, str)
    except UsageError as exc:
        refused = exc
    else:
        return
    assert refused.message
    assert refused.hint
    assert "\n" not in refused.message
