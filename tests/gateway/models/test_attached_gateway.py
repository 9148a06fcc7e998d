"""One model's gateway behind the address of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from turbofit.core.errors import LaunchError
from turbofit.gateway.models.served_model import insist


class Hanging:
    """An address whose loop never comes to what it is asked."""

    alive = True
    seconds = 0.0

    def call(self, _ask: Callable[[Any], object], seconds: float = 10.0) -> None:
        self.seconds += seconds
        assert self.seconds <= 60, "whoever waits so long hears no signal"
        raise LaunchError("the gateway did not answer", hint="try again")


def test_a_loop_that_hangs_is_not_waited_for_without_end() -> None:
    front: Any = Hanging()
    with pytest.raises(LaunchError, match="did not answer"):
        insist(front, lambda _: None)
    assert front.seconds == 60
