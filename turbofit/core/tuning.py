"""The record of `turbofit tune`: its trials, their figures and the best trial."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from turbofit.core.plan import Goal
from turbofit.core.struct import Struct, const, doc

TUNE_SCHEMA: Final = "turbofit.tune/1"

#: The option of a trial with another number of proposed tokens.
_DRAFT_TOKENS: Final = "speculative_num_draft_tokens"


class TrialForecast(Struct):
    """The forecast of the speed of a trial's settings under the load.

    A figure is null if forecasts of its kind are not shown: most of them are off by more than a
    factor of two, or none was compared with a measurement.
    """

    requests_per_second: float | None
    ttft: Annotated[float | None, doc("Seconds to the first token of a request that comes last.")]
    tpot: Annotated[float | None, doc("Seconds of each later token.")]

    @property
    def words(self) -> str:
        """The forecast of requests a second, as a text; ``unknown`` without a forecast."""
        rate = self.requests_per_second
        return "unknown" if rate is None else f"{rate:.2f}"


class TurnFigures(Struct):
    """The first tokens of the turns of one number in their conversations; times are in seconds."""

    turn: int
    answered: int
    ttft_p50: float
    ttft_p90: float
    cached: Annotated[
        float | None, doc("The share of the prompts' tokens from the prefix cache, by the server.")
    ] = None

    @property
    def cached_words(self) -> str:
        """The share of the prompt from the cache, as a text; ``unknown`` if no server told it."""
        return "unknown" if self.cached is None else f"{self.cached:.0%}"


class SpeedFigures(Struct):
    """The measured speed of a server under a load; times are in seconds."""

    requests_per_second: float
    output_tokens_per_second: float
    ttft_p50: float
    ttft_p90: float
    tpot_p50: float
    tpot_p90: float
    e2e_p50: float
    e2e_p90: float
    answered: Annotated[int, doc("Requests with an answer.")]
    failed: Annotated[int, doc("Requests without an answer.")]
    ttft_p99: Annotated[float | None, doc("Null in older documents.")] = None
    tpot_p99: Annotated[float | None, doc("Null in older documents.")] = None
    turns: Annotated[tuple[TurnFigures, ...], doc("By turn, with --turns above 1.")] = ()


class TrialRecord(Struct):
    """One trial: an engine was started with certain settings, and a load was sent to it."""

    number: int
    options: Annotated[dict[str, object], doc("What the trial adds to the given options.")]
    engine: str
    tp: int
    replicas: int
    max_batch_size: int
    max_prefill_token_num: int
    quant_policy: int
    enable_prefix_caching: bool
    kv_tokens: Annotated[int, doc("KV tokens of all groups.")]
    forecast: TrialForecast
    outcome: Annotated[
        Literal["measured", "started", "died", "unserved"],
        doc("`started`: it answered, on pretend GPUs without a clock, where no speed is known."),
    ]
    why: Annotated[str, doc("Why the engine died or was not measured; else empty.")] = ""
    measured: SpeedFigures | None = None
    meets_slo: bool = False
    seconds: Annotated[float, doc("Seconds from the start of the engine to its end.")] = 0.0
    again: Annotated[bool, doc("The best trial again, under a load of twice the length.")] = False

    @property
    def settings(self) -> str:
        """The settings of the trial, in words."""
        kv = f", KV int{self.quant_policy}" if self.quant_policy else ""
        prefix = ", prefix caching" if self.enable_prefix_caching else ""
        again = ", again" if self.again else ""
        if _DRAFT_TOKENS in self.options:
            prefix += f", {self.options[_DRAFT_TOKENS] or 0} draft tokens"
        return (
            f"{self.engine}, tp {self.tp} x {self.replicas}, batch {self.max_batch_size}, prefill "
            f"{self.max_prefill_token_num}{kv}{prefix}{again}"
        )


class CapacityLoad(Struct):
    """One load in the search for the number of clients that keep an SLO."""

    clients: Annotated[int | None, doc("Requests at once; null: requests arrive at a rate.")]
    rate: Annotated[
        float | None, doc("Requests, or conversations, that begin a second; null in a closed loop.")
    ]
    measured: SpeedFigures
    keeps: Annotated[bool, doc("Whether the load kept the SLO.")]


class Capacity(Struct):
    """The number of clients that keep an SLO, by the clock of pretend GPUs."""

    clients: Annotated[int, doc("The most clients at once that kept the SLO; 0: not one.")] = 0
    more: Annotated[bool, doc("Whether more clients may keep the SLO: they were not tried.")] = (
        False
    )
    rate: Annotated[
        float | None, doc("The most requests, or conversations, a second that kept the SLO.")
    ] = None
    loads: tuple[CapacityLoad, ...] = ()
    why: Annotated[str, doc("Why the search ended early; else empty.")] = ""


class Tuning(Struct):
    """All trials for one model, promise and load on one machine, and the best trial."""

    schema: Annotated[str, const(TUNE_SCHEMA)] = TUNE_SCHEMA
    turbofit_version: str
    created: str
    model: Annotated[str, doc("Name, architecture, parameters.")]
    gpus: Annotated[tuple[str, ...], doc("Names of all visible cards, sorted.")]
    driver: str
    lmdeploy: str
    pretend: Annotated[bool, doc("Tuned on pretend GPUs; not valid for real cards.")] = False
    promise: Annotated[dict[str, object], doc("The options of the plan that the person gave.")]
    load: Annotated[dict[str, object], doc("The options of the load that were given.")]
    goal: Goal
    slo: Annotated[
        dict[str, float], doc("Seconds that 90 % of requests may take: ttft, tpot, e2e.")
    ]
    best: Annotated[int | None, doc("The best trial's number; null: no trial meets the SLO.")] = (
        None
    )
    trials: tuple[TrialRecord, ...] = ()
    stopped: Annotated[str, doc("Which settings were not tried, and why.")] = ""
    seconds: float = 0.0
    forecast: Annotated[
        str,
        doc("On pretend GPUs: the forecast that the clock runs by, and the forecast's surety."),
    ] = ""
    capacity: Annotated[
        Capacity | None,
        doc("Only with a clock and an SLO, and with neither a number of clients nor a rate given."),
    ] = None

    @property
    def winner(self) -> TrialRecord | None:
        """The best trial; None if no trial meets the SLO."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    @property
    def started(self) -> int:
        """The number of settings that answered on pretend GPUs, where no speed is known."""
        return sum(trial.outcome == "started" for trial in self.trials)

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the tuning."""
        return self.stopped.startswith("SIG")
