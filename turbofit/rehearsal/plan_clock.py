"""Makes the clock of a plan's engines: a table with the forecast's seconds of each forward.

Only TurboMind has a clock: csrc/clock.c reads the launches of its kernels. A plan without a
forecast of speed has no clock.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from turbofit.core.plan import EnginePlan, Plan
from turbofit.memory.engines import engine_of
from turbofit.planning.speed import engine_rates, rates
from turbofit.planning.throughput import surety_of_speed
from turbofit.rehearsal.pretend.clock import StepTable


class ClockChoice(NamedTuple):
    """How time passes on pretend GPUs.

    Forwards take ``factor`` times the forecast's seconds; 0 means that forwards take no time.
    ``word`` says how certain the forecast is, or why there is no clock.
    """

    factor: float
    word: str

    @property
    def words(self) -> str:
        """The sentence that a report prints beside each speed of the pretend machine."""
        if not self.factor:
            return f"no clock: {self.word}"
        slower = "" if self.factor == 1 else f", {self.factor:g} times slower than life"
        return f"time by forecast ({self.word}){slower}"


#: The choice of a person who wants no clock.
NO_CLOCK: Final = ClockChoice(0.0, "--clock 0")


def clock_for(plan: Plan, factor: float) -> ClockChoice:
    """Return the clock for a plan, if its user asks for this factor."""
    if not factor:
        return NO_CLOCK
    if plan.backend.on_torch:
        return ClockChoice(0.0, f"forwards of {plan.backend.name} are not read, as TurboMind's are")
    gpus = [plan.machine.gpu(ledger.index) for ledger in plan.ledgers]
    surety = surety_of_speed(
        plan.model, plan.backend.name, gpus, images=bool(plan.promise.limits.units_per_request)
    )
    return ClockChoice(factor, surety.word) if surety.known else ClockChoice(0.0, surety.why)


def step_table(plan: Plan, engine: EnginePlan) -> StepTable:
    """Return the forecast's seconds of the forwards of one engine of a plan."""
    account, figures, speeds = engine_of(plan), rates(), engine_rates(plan, engine)
    largest_image = max(plan.promise.limits.units_per_request, engine.units_per_forward)
    return StepTable(
        forward=[
            speeds.seconds(figures, float(tokens))
            for tokens in range(account.forward_tokens(engine.settings) + 1)
        ],
        image=[speeds.tower_seconds(units) for units in range(largest_image + 1)],
        pair=speeds.pair_seconds,
        context=speeds.context_seconds,
    )
