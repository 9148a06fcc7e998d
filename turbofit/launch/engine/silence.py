"""Whether an engine that answers nobody is slow or hung: its own signs of life decide.

An engine is *silent* since it last brought somebody a byte, as long as it owes somebody an answer.
A silent engine is looked at: it gives a *sign* while its processes use a processor, or one of its
GPUs computes. Without any sign for `Timing.silence` seconds it is hung, however long a forecast
is: nothing works on an answer. With signs it may be slow, so that it has `Timing.longest_silence`
seconds, or four times what the plan's longest request takes by forecast where that is more: a
kernel that never ends, and NCCL that waits for a GPU which does not answer, keep a GPU busy.

Under: an engine that waits for a disk, as in swap, gives no sign. Over: a GPU that another process
keeps busy, or that does not tell (MIG, a driver that hangs), counts as a sign.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal, Protocol

from turbofit.launch.engine.check import seconds_of, whole_check
from turbofit.launch.engine.kernel import processor_seconds
from turbofit.launch.serve.gpu_monitor import any_busy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.launch.engine.engine_client import Timing

#: The longest request may take so many times its forecast (seen: 1.3 times).
_FORECASTS: Final = 4
#: Of a processor, from which on a process works. An idle LMDeploy that is asked for a token every
#: few seconds needs a hundredth.
_SHARE: Final = 0.05
#: Parts of `Timing.silence`: when looks begin, how often one comes, and what makes it doubtful.
_FIRST, _EVERY, _DOUBT = 0.25, 0.1, 0.5


class Owing(Protocol):
    """What asks an engine: whether it owes an answer, and when it last brought something.

    ``heard_at`` is by the supervisor's clock; where it had owed nothing, when it was asked.
    """

    @property
    def owes(self) -> bool: ...

    @property
    def heard_at(self) -> float: ...


class Silence:
    """How long one start of an engine has given no sign of life.

    ``group`` is its process group, ``pretend``: no GPU of its is real.
    """

    def __init__(self, plan: Plan, timing: Timing, group: int, *, pretend: bool) -> None:
        self._plan, self._timing, self._group = plan, timing, group
        self._uuids = () if pretend else tuple(gpu.uuid for gpu in plan.gpus)
        #: When it last gave a sign that it works, and was last looked at; what it had used then.
        self._worked_at = self._looked_at = float("-inf")
        self._used = 0.0
        #: When it counts as hung if it goes on without a sign.
        self.ends_at = float("inf")

    def look(
        self, now: float, ready_at: float, owing: Sequence[Owing]
    ) -> Literal["heard", "works", "doubtful", "hung"]:
        """Where it stands; what it owed before it was ready counts from then."""
        since = max(ready_at, *(each.heard_at for each in owing))
        most = self._timing.silence
        if not any(each.owes for each in owing) or now - since < _FIRST * most:
            self._looked_at = float("-inf")
            return "heard"
        if now - self._looked_at >= _EVERY * most and self._works(now):
            self._worked_at = now
        idle_since = max(since, self._worked_at)
        self.ends_at = idle_since + most
        if now >= self.ends_at or now - since >= self._longest:
            return "hung"
        return "doubtful" if now - idle_since >= _DOUBT * most else "works"

    def _works(self, now: float) -> bool:
        """Whether it has worked since the last look, or its GPUs work now."""
        before, used = (self._looked_at, self._used), processor_seconds(self._group)
        self._looked_at, self._used = now, used
        if used - before[1] > _SHARE * (now - before[0]):
            return True
        return bool(self._uuids) and any_busy(self._uuids) is not False

    @cached_property
    def _longest(self) -> float:
        forecast = seconds_of(self._plan, whole_check(self._plan, ""))
        return max(self._timing.longest_silence, _FORECASTS * forecast)
