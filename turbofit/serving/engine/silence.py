"""Decides by an engine's signs of life whether it is slow or hung when it answers nobody.

An engine is *silent* since the last byte of an answer to anybody, or since it was asked if that is
later, as long as it owes an answer. Where turbofit itself did not run (SIGSTOP, a paused virtual
machine), silence counts from when it runs again. A silent
engine is observed: it gives a *sign* while its processes use a processor, or one of its GPUs
computes. Without a sign for `Timing.silence` seconds it is hung, however long the forecast is:
nothing works on an answer. With signs it may be slow, and has `Timing.longest_silence` seconds, or
four times the forecast of the plan's longest request if that is more: a kernel that never ends, and
NCCL that waits for a GPU which does not answer, keep a GPU busy.

An engine that waits for a disk, as when swapping, gives no sign and is judged wrongly. A GPU that
another process keeps busy, or that does not report (MIG, a hanging driver), counts as a sign.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

from turbofit.serving.engine.check import seconds_of, whole_check
from turbofit.serving.engine.kernel import processor_seconds
from turbofit.serving.gpu_monitor import any_busy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.gateway.routing.engines import RoutedEngine
    from turbofit.serving.engine.engine_client import Probe, Timing

    #: A client of an engine: whether and since when it waits, and when a byte last came. Both are
    #: times of the supervisor's clock; ``asked_at`` counts only while it waits.
    Owing = Probe | RoutedEngine

#: The longest request may take this many times its forecast (measured: 1.3 times).
_FORECASTS: Final = 4
#: The share of a processor above which a process counts as working. An idle LMDeploy that is asked
#: for a token every few seconds needs a hundredth.
_SHARE: Final = 0.05
#: Parts of `Timing.silence`: when observing begins, its interval, and when doubt begins.
_FIRST, _EVERY, _DOUBT = 0.25, 0.1, 0.5


class Silence:
    """Measures how long one start of an engine has given no sign of life.

    ``group`` is its process group; ``pretend``: its GPUs are not real.
    """

    def __init__(self, plan: Plan, timing: Timing, group: int, *, pretend: bool) -> None:
        self._plan, self._timing, self._group = plan, timing, group
        self._uuids = () if pretend else tuple(gpu.uuid for gpu in plan.gpus)
        #: When the engine last gave a sign and was last observed; the processor seconds used until
        #: then.
        self._worked_at = self._looked_at = float("-inf")
        self._used = 0.0
        #: The time of the last look, and the last time at which none had come for long.
        self._seen_at, self._awake_at = float("inf"), float("-inf")
        #: The time at which the engine counts as hung if no sign comes.
        self.ends_at = float("inf")

    def look(
        self, now: float, ready_at: float, owing: Sequence[Owing]
    ) -> Literal["heard", "works", "doubtful", "hung"]:
        """The engine's state; one that was owed earlier counts as late only from ``ready_at``."""
        most = self._timing.silence
        if now - self._seen_at >= _FIRST * most:
            self._awake_at = now
        self._seen_at = now
        asked = [each.asked_at for each in owing if each.owes]
        heard = [each.heard_at for each in owing]
        since = max(ready_at, self._awake_at, min(asked, default=now), *heard)
        if not asked or now - since < _FIRST * most:
            self._looked_at = float("-inf")
            return "heard"
        if now - self._looked_at >= _EVERY * most:
            used = processor_seconds(self._group)
            works = used - self._used > _SHARE * (now - self._looked_at)
            self._looked_at, self._used = now, used
            if works or (self._uuids and any_busy(self._uuids) is not False):
                self._worked_at = now
        idle_since = max(since, self._worked_at)
        self.ends_at = idle_since + most
        if now >= self.ends_at or now - since >= self._longest:
            return "hung"
        return "doubtful" if now - idle_since >= _DOUBT * most else "works"

    @cached_property
    def _longest(self) -> float:
        forecast = seconds_of(self._plan, whole_check(self._plan, ""))
        return max(self._timing.longest_silence, _FORECASTS * forecast)
