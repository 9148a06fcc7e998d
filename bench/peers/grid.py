"""What is compared: pairs of a model and a machine, and the settings put on each."""

from __future__ import annotations

from typing import Any, NamedTuple


class Pair(NamedTuple):
    """A model on a machine; every setting gets the same ``tp``.

    ``quick``: part of the short run.
    """

    model: str
    on: str
    tp: int = 1
    quick: bool = False

    @property
    def name(self) -> str:
        """A short name for tables."""
        return f"{self.model} {self.on}" + (f" tp{self.tp}" if self.tp > 1 else "")


class Setting(NamedTuple):
    """LMDeploy's TurboMind with so much changed; ``changed`` None is turbofit's plan."""

    name: str
    changed: dict[str, Any] | None


PLAN = "turbofit's plan"

PAIRS: tuple[Pair, ...] = (
    Pair("internvl2-8b", "1xrtx3090", quick=True),
    Pair("internvl2-2b", "1xrtx3090"),
    Pair("qwen2-vl-7b", "1xrtx3090", quick=True),
    Pair("qwen2-vl-2b", "1xrtx3090"),
    Pair("qwen2.5-7b", "1xrtx3090", quick=True),
    Pair("internvl2-26b-awq", "1xrtx3090"),
    Pair("internvl2-8b", "1xl4:free=19GiB"),
    Pair("internvl2-2b", "1xl4:free=19GiB"),
    Pair("qwen2-vl-7b", "1xl4:free=19GiB"),
    Pair("qwen2-vl-2b", "1xl4:free=19GiB"),
    Pair("qwen2.5-7b", "1xl4:free=19GiB"),
    Pair("internvl2-8b", "1xv100-32g"),
    Pair("internvl2-26b-awq", "1xv100-32g"),
    Pair("qwen2-vl-7b", "1xv100-32g"),
    Pair("qwen2.5-7b", "1xv100-32g"),
    Pair("internvl2-8b", "2xrtx4090", tp=2),
    Pair("internvl2-26b-awq", "2xrtx4090", tp=2),
    Pair("qwen2-vl-7b", "2xrtx4090", tp=2),
)

SETTINGS: tuple[Setting, ...] = (
    Setting(PLAN, None),
    Setting("LMDeploy's defaults", {}),
    Setting("advice: 0.5", {"cache_max_entry_count": 0.5}),
    Setting("advice: 0.4", {"cache_max_entry_count": 0.4}),
    Setting("advice: 0.2", {"cache_max_entry_count": 0.2}),
)
