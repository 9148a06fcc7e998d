"""The plan, an immutable JSON document, and the types of its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from turbofit.core.engine_end import Rehearsal
from turbofit.core.errors import DoesNotFitError, PackageError, UsageError
from turbofit.core.forecast import Throughput, UsualImage
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.promise import Promise
from turbofit.core.struct import JsonDocument, Options, Struct, const, doc, to_builtins
from turbofit.core.units import MIB, round_up

PLAN_SCHEMA: Final = "turbofit.plan/2"

EngineName = Literal["turbomind", "pytorch", "transformers"]
Goal = Literal["throughput", "latency", "context"]
T = TypeVar("T")
TermPhase = Literal["before", "context", "weights", "cache", "buffers", "transient"]
Basis = Literal["formula", "file", "rehearsed", "measured", "estimate"]
#: Outcomes of a rehearsal, the gravest first; the gravest outcome of all engines is the plan's.
_GRAVE: Final = ("out_of_memory", "hang", "failed", "served")
#: Width and height of a photograph, as clients usually send one: the picture of a screen.
PHOTOGRAPH: Final = (1920, 1080)
#: Cards whose used memory differs by fewer bytes get the same settings.
ALIKE: Final = 64 * MIB
_TURBOMIND_NAMES: Final = (
    "tp", "dtype", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
    "session_len", "quant_policy", "cache_block_seq_len", "communicator", "async_",
    "enable_prefix_caching", "model_format", "language_model_only", "hf_overrides",
)  # fmt: skip
#: LMDeploy's options of a draft, by the fields of its ``SpeculativeConfig``.
DRAFT_FIELDS: Final = {
    "method": "speculative_algorithm",
    "model": "speculative_draft_model",
    "num_speculative_tokens": "speculative_num_draft_tokens",
}
SPECULATIVE: Final = tuple(DRAFT_FIELDS.values())
_PYTORCH_NAMES: Final = (
    "tp", "dtype", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
    "session_len", "quant_policy", "cache_block_seq_len", "enable_prefix_caching", "model_format",
    "language_model_only", "num_gpu_blocks", "eager_mode", "cudagraph_capture_batch_sizes",
    "distributed_executor_backend", "hf_overrides", "prefix_cache_state_budget", "adapters",
    *SPECULATIVE,
)  # fmt: skip
_OTHER_NAMES: Final = {"pytorch": {"cache_block_seq_len": "block_size"}}
#: The phases whose terms are in memory when the cache is sized.
BEFORE_CACHE: Final = ("before", "context", "weights")
#: The most threads of an engine that prepare images; more were not tested.
MOST_IMAGE_THREADS: Final = 16
#: Bytes that the trial of one grammar may take.
GRAMMAR_TRIAL: Final = 512 * MIB
#: Bytes of the process that tries grammars, with the largest tokenizer, torch and Transformers.
GRAMMAR_PROCESS: Final = GRAMMAR_TRIAL + 768 * MIB


def config_names(engine: str) -> tuple[tuple[str, str], ...]:
    """Return the two names of each setting of an engine: turbofit's, and the engine config's.

    An unknown engine has the settings of TurboMind.
    """
    of_engine = {
        "pytorch": _PYTORCH_NAMES, "transformers": ("dtype", "max_batch_size", "session_len")
    }  # fmt: skip
    others = _OTHER_NAMES.get(engine, {})
    return tuple((name, others.get(name, name)) for name in of_engine.get(engine, _TURBOMIND_NAMES))


#: The tokens of text and of an answer that a plan supposes of each request, and of the answer of a
#: model whose chat template lets it think.
PROMPT_TOKENS: Final = 256
OUTPUT_TOKENS: Final = 256
THINKING_TOKENS: Final = 1024
#: Where images wait for each other, an answer whose request states no length may be this often as
#: long as is supposed.
UNSTATED_ANSWERS: Final = 4


class Workload(Struct):
    """The requests that a person asks a plan for, and what a plan supposes of clients beside them.

    =================================  ====================================================
    a client                           what the plan supposes, and the sign
    =================================  ====================================================
    streams, or wants one piece        either: the engine tells the gateway each first token
    states ``max_tokens``, or not      either; if images queue, turbofit states it if needed
    asks once, or holds a conversation asks once; no memory or time is saved by a past
    sends new images, or known ones    new images; a known image is prepared once
    sends large images or photographs  memory: the largest; the batch: `PHOTOGRAPH` and text
    =================================  ====================================================

    Requests at once and speeds are of texts of ``prompt_tokens`` and answers of ``output_tokens``;
    the account of memory and the batch do not depend on these.

    If ``context`` is None, turbofit takes the model's maximum, or less if the cache holds less. If
    ``concurrency`` or ``queue_images`` is None, turbofit chooses a value.
    """

    images: Annotated[int, doc("Images a request.")] = 1
    image_size: Annotated[
        tuple[int, int] | None, doc("Width and height in pixels; null: the worst possible size.")
    ] = None
    context: Annotated[int | None, doc("Tokens of one request, prompt and answer.")] = None
    concurrency: Annotated[
        int | None, doc("Requests that all groups together run at once; null: turbofit chooses.")
    ] = None
    goal: Annotated[Goal, doc("The measure by which turbofit chooses a shape.")] = "throughput"
    queue_images: Annotated[
        bool | None, doc("Whether image requests wait, so that the peak pays for one of them.")
    ] = None
    prompt_tokens: Annotated[int, doc("Tokens of text that a request has beside its images.")] = (
        PROMPT_TOKENS
    )
    output_tokens: Annotated[int, doc("Tokens of an answer.")] = OUTPUT_TOKENS

    @property
    def unstated_answer(self) -> int:
        """Tokens of an answer whose request states no length, where images wait for each other."""
        return UNSTATED_ANSWERS * self.output_tokens


class Settings(Struct):
    """LMDeploy's options, under LMDeploy's names.

    ``num_gpu_blocks`` and all later options are for the PyTorch engine alone.
    """

    tp: int = 1
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    cache_max_entry_count: Annotated[float, doc("Share of free memory for the cache.")] = 0.8
    max_prefill_token_num: int = 8192
    max_batch_size: int = 128
    session_len: int = 32768
    quant_policy: Annotated[int, doc("0 none, 4 int4, 8 int8, 16 and 17 fp8, 42 TurboQuant.")] = 0
    cache_block_seq_len: Annotated[
        int, doc("Tokens of a block, PyTorch's block_size."), Meta(ge=1)
    ] = 64
    communicator: Annotated[Literal["nccl", "native", "cuda-ipc"], doc("TurboMind's alone.")] = (
        "nccl"
    )
    async_: Annotated[int, doc("TurboMind's alone.")] = 1
    enable_prefix_caching: bool = False
    model_format: str | None = None
    language_model_only: bool = False
    num_gpu_blocks: Annotated[int, doc("Blocks of the cache; 0: the ratio decides.")] = 0
    eager_mode: bool = False
    cudagraph_capture_batch_sizes: tuple[int, ...] | None = None
    distributed_executor_backend: Literal["uni", "mp", "ray"] | None = None
    hf_overrides: Annotated[str | UnsetType, doc("JSON; absent if not given.")] = UNSET
    prefix_cache_state_budget: Annotated[
        int | UnsetType, doc("Slots of delta nets' states for prefixes; absent if not given.")
    ] = UNSET
    adapters: Annotated[
        tuple[str, ...] | UnsetType, doc("NAME=PATH of each adapter; absent if not given.")
    ] = UNSET
    speculative_algorithm: Annotated[str | UnsetType, doc("Only with a draft.")] = UNSET
    speculative_draft_model: Annotated[str | UnsetType, doc("The draft's folder.")] = UNSET
    speculative_num_draft_tokens: Annotated[
        int | UnsetType, doc("Tokens that the draft proposes in each step.")
    ] = UNSET

    def requests_in(self, kv_tokens: int, size: int) -> int:
        """Return how many requests of ``size`` tokens fit in a cache of ``kv_tokens`` tokens.

        Each request takes whole blocks.
        """
        return kv_tokens // round_up(size, self.cache_block_seq_len)


class Term(Struct):
    """One named amount of memory in the account (ledger) of a GPU."""

    term: Annotated[str, doc("The name of the term.")]
    phase: Annotated[TermPhase, doc("When the memory is taken; only the largest transient counts.")]
    bytes: Annotated[int, doc("Bytes of this GPU.")]
    basis: Annotated[Basis, doc("The source of the bytes; an estimate is an upper end.")]
    note: Annotated[str, doc("Details for people.")] = ""
    worst: Annotated[bool, doc("Marks the transient that decides the peak.")] = False
    rehearsed: Annotated[int | None, doc("Bytes of the term on pretend GPUs; null: unknown.")] = (
        None
    )


class GpuLedger(Struct):
    """The memory of one GPU under the plan, in bytes."""

    index: Annotated[int, doc("In PCI order.")]
    uuid: str
    name: str
    total: Annotated[int, doc("Bytes of the card."), Meta(gt=0)]
    reserved: Annotated[int, doc("Bytes that the driver keeps.")]
    used: Annotated[int, doc("Bytes that others hold.")]
    free: Annotated[int, doc("Bytes that CUDA calls free before our context.")]
    terms: tuple[Term, ...]
    steady: Annotated[int, doc("Bytes in use after warm-up, before the first image.")]
    load_peak: Annotated[int, doc("Bytes in use while loading, at most.")]
    peak: Annotated[int, doc("Bytes in use in the worst case.")]
    headroom: Annotated[int, doc("total - reserved - max(peak, load_peak).")]
    margin: Annotated[int, doc("Bytes that must stay free.")]
    withheld: Annotated[
        int | UnsetType, doc("Bytes of the margin that a budget withholds; only with a budget.")
    ] = UNSET

    @property
    def usable(self) -> int:
        """Bytes of the card that CUDA can allocate."""
        return self.total - self.reserved

    def bytes_of(self, name: str) -> int:
        """Return the bytes of all terms with this name."""
        return sum(term.bytes for term in self.terms if term.term == name)

    def bytes_in(self, *phases: str) -> int:
        """Return the bytes of all terms of these phases."""
        return sum(term.bytes for term in self.terms if term.phase in phases)

    @property
    def free_for_cache(self) -> int:
        """Bytes that are free when an engine of a current release sizes its cache."""
        return self.usable - self.bytes_in(*BEFORE_CACHE)

    @property
    def beyond_budget(self) -> int:
        """Bytes of the margin that a budget withholds; 0 without a budget."""
        return 0 if self.withheld is UNSET else self.withheld

    @property
    def budget(self) -> int | None:
        """Bytes that the engines may use on this GPU; None without a budget."""
        return None if self.withheld is UNSET else self.usable - self.used - self.withheld

    @property
    def most(self) -> int:
        """The most bytes in use: while loading or in the worst case, whichever is more."""
        return max(self.load_peak, self.peak)

    @property
    def fits(self) -> bool:
        """Whether at least ``margin`` bytes stay free."""
        return self.headroom >= self.margin


class Backend(Struct):
    """LMDeploy's engine that the plan is for, or the server for Transformers."""

    name: EngineName
    version: str
    communicator: Annotated[str, doc("The library that joins the GPUs of one engine.")] = ""
    reason: Annotated[str, doc("The reason for this number of engines on these GPUs.")] = ""

    @property
    def of_lmdeploy(self) -> bool:
        """Whether the engine is LMDeploy's; turbofit's own server runs Transformers."""
        return self.name != "transformers"

    @property
    def on_torch(self) -> bool:
        """Whether torch allocates the engine's memory; TurboMind has its own allocator."""
        return self.name != "turbomind"

    @property
    def serial(self) -> bool:
        """Whether the engine processes one request at a time."""
        return not self.of_lmdeploy

    @property
    def is_pytorch(self) -> bool:
        """Whether the engine is LMDeploy's PyTorch engine, whose ranks are workers of Ray."""
        return self.name == "pytorch"


class Kv(Struct):
    """The KV cache of one engine; each rank holds a part of it."""

    bytes_per_token: Annotated[int, doc("Bytes of one KV token on a rank.")]
    tokens: Annotated[int, doc("Tokens of all ranks together."), Meta(ge=0)]
    region_bytes: Annotated[int, doc("Bytes of the cache of a rank.")]
    longest_request_tokens: Annotated[int, doc("Tokens that one request may have.")]


class HostMemory(Struct):
    """Host memory that the engines take, in bytes; ``available`` is None if unknown.

    ``pageable`` includes the ``image_cache`` of each engine, and the process that tries grammars.
    """

    pinned: Annotated[int, doc("Bytes.")]
    pageable: Annotated[int, doc("Bytes.")]
    available: Annotated[int | None, doc("Bytes; null where unknown.")]
    image_threads: Annotated[
        int | None, doc("Image threads of each engine; null: the host's cores decide.")
    ] = None
    image_cache: Annotated[int, doc("Bytes of prepared images that each engine keeps.")] = 0

    @property
    def total(self) -> int:
        """Bytes of pinned and pageable memory together."""
        return self.pinned + self.pageable


def image_threads(cores: int, engines: int) -> int:
    """Return the number of threads that prepare images in each of ``engines`` engines of LMDeploy.

    The threads leave one core to the event loop. At least two threads run: LMDeploy itself has one
    thread, and two threads share a core with little loss. Most of their work runs without Python's
    lock.
    """
    return min(MOST_IMAGE_THREADS, max(2, cores // engines - 1))


class Candidate(Struct):
    """A shape that the planner considered; ``why_not`` is empty for the chosen shape."""

    engine: str
    tp: int
    replicas: int
    groups: tuple[tuple[int, ...], ...]
    settings: Annotated[dict[str, object], doc("The settings that were varied.")]
    fits: bool
    kv_tokens: Annotated[int, doc("Tokens of all groups.")]
    score: Annotated[
        float | None,
        doc(
            "The goal's figure: requests a second, answers a second of one client, or KV tokens; 0"
            " for a shape that does not fit, null if the speed is not shown."
        ),
    ]
    why_not: Annotated[str, doc("The reason; empty for the chosen shape.")]


class LimitCost(Struct):
    """Cache, requests and speed under one image limit; GPUs and prefill size are the plan's.

    Speeds are forecasts for images of the worst size; null if the plan's own speed is null.
    """

    limit: Annotated[int, doc("Tiles or pixels of an image.")]
    option: Annotated[str, doc("The option that sets this limit.")]
    image_tokens: Annotated[int, doc("Tokens of one image of the worst size.")]
    kv_tokens: Annotated[int, doc("Tokens of all groups.")]
    requests_at_once: Annotated[int, doc("Requests that run at once over all groups.")]
    requests_per_second: float | None
    seconds_to_first_token: Annotated[float | None, doc("For a request to an idle engine.")]


#: If a plan holds fewer requests at once, it names a lower image limit that holds as many.
_FEW: Final = 8


def roomier_limit(costs: Iterable[LimitCost], limit: int, requests: int) -> LimitCost | None:
    """Return the largest image limit below ``limit`` with which 8 requests run at once.

    If no limit gives 8, the limit that gives the most; None if ``requests``, those of ``limit``,
    are 8 already. ``costs`` begin with the largest limit.
    """
    best = None
    for cost in costs if requests < _FEW else ():
        if cost.limit < limit and cost.requests_at_once > requests:
            best, requests = cost, cost.requests_at_once
        if requests >= _FEW:
            break
    return best


class Footprint(Struct):
    """The most memory of the engines, and the memory that their GPUs have left for others."""

    taken: Annotated[tuple[int, ...], doc("Bytes at most on each GPU, in the ledgers' order.")]
    left: Annotated[int, doc("Bytes for others on the fullest GPU, beyond the margin.")]
    servers: Annotated[
        int, doc("Engines like these that the GPUs and the host hold, these included.")
    ]


class Remedy(Struct):
    """A change of the request or the machine, and the computed effect of this change."""

    change: str
    effect: str

    @property
    def text(self) -> str:
        """The change and the effect of the change, in one line."""
        return f"{self.change}: {self.effect}"


class Command(Struct):
    """The command line of one engine."""

    env: Annotated[dict[str, str], doc("Variables of the engine's environment.")]
    argv: Annotated[tuple[str, ...], doc("The words of the command.")]


class ServeCommand(Struct):
    """The command ``turbofit serve`` of the plan, which holds every client to the limits."""

    argv: Annotated[tuple[str, ...], doc("The words of the command.")]


class EnginePlan(Struct):
    """One engine: its GPUs, its settings and command, and its memory."""

    backend: EngineName
    gpus: Annotated[
        tuple[int, ...],
        doc("The machine's indices, in the order of the ranks."),
        Meta(min_length=1),
    ]
    settings: Annotated[Settings, doc("LMDeploy's settings, under LMDeploy's own names.")]
    kv: Kv
    units_per_forward: Annotated[int, doc("Vision units that the peak pays for in one forward.")]
    requests: Annotated[
        float, doc("Requests at once on average; the gateway divides requests in this proportion.")
    ]
    ledgers: Annotated[
        tuple[GpuLedger, ...], doc("The ledger of each GPU, in the order of `gpus`.")
    ]
    command: Annotated[Command | None, doc("LMDeploy's own command, without limits.")] = None
    rehearsal: Annotated[Rehearsal | None, doc("Null without a rehearsal.")] = None
    device_map: Annotated[
        dict[str, int | str] | None,
        doc("For Transformers: the place of each module: a GPU, cpu or disk."),
    ] = None

    def is_like(self, other: EnginePlan) -> bool:
        """Return whether another engine has the same settings and equally full cards."""
        if (self.settings, self.units_per_forward) != (other.settings, other.units_per_forward):
            return False
        pairs = list(zip(self.ledgers, other.ledgers, strict=False))
        cards = all((a.name, a.total) == (b.name, b.total) for a, b in pairs)
        full = all(abs(a.used - b.used) < ALIKE for a, b in pairs)
        return len(self.gpus) == len(other.gpus) and cards and full

    def engine_config(self) -> Any:
        """Return the settings as LMDeploy's ``TurbomindEngineConfig`` or ``PytorchEngineConfig``.

        Raises:
            PackageError: LMDeploy is not installed.
            UsageError: the engine is Transformers; LMDeploy has no config for Transformers.
        """
        if self.backend == "transformers":
            raise UsageError(
                "this engine is Transformers: LMDeploy has no config for it",
                hint="serve the plan with turbofit serve",
            )
        try:
            from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
        except ImportError:
            from turbofit.core.installation import install_command

            how = install_command("lmdeploy")
            raise PackageError("LMDeploy is not installed", hint=how) from None
        kind = {"pytorch": PytorchEngineConfig}.get(self.backend, TurbomindEngineConfig)
        return kind(**self.lmdeploy_settings())

    def lmdeploy_settings(self) -> Options:
        """Return the settings under the names of LMDeploy's config for this backend."""
        values = to_builtins(self.settings)
        if "hf_overrides" in values:
            values["hf_overrides"] = json.loads(values["hf_overrides"])
        if "adapters" in values:
            values["adapters"] = dict(word.split("=", 1) for word in values["adapters"])
        names = [pair for pair in config_names(self.backend) if pair[0] not in SPECULATIVE]
        return {theirs: values[name] for name, theirs in names if name in values}

    def speculative_config(self) -> Options:
        """Return the fields of LMDeploy's ``SpeculativeConfig``; empty without a draft."""
        values = to_builtins(self.settings)
        return {field: values[name] for field, name in DRAFT_FIELDS.items() if name in values}


def may_evict(settings: Settings, tokens: int) -> bool:
    """Return whether a full batch may need more than the ``tokens`` of the KV cache.

    The engine then evicts a request, which starts again.
    """
    return settings.max_batch_size * settings.session_len > tokens


def alike(engines: Sequence[EnginePlan]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of all engines; engines with equal cards and settings share a tuple.

    Cards with a small difference in used memory count as equal.
    """
    numbers = range(len(engines))
    return tuple(map(tuple, sets_of(numbers, lambda a, b: engines[a].is_like(engines[b]))))


def sets_of(items: Iterable[T], like: Callable[[T, T], bool]) -> list[list[T]]:
    """Divide items into sets: an item joins the first set whose first item ``like`` accepts."""
    sets: list[list[T]] = []
    for item in items:
        members = next((members for members in sets if like(members[0], item)), None)
        if members is None:
            sets.append(members := [])
        members.append(item)
    return sets


class Plan(JsonDocument):
    """All decisions about serving a model on a machine, with reasons and forecasts.

    Every engine keeps ``promise``. Later stages replace ``engines`` and add reasons and warnings.
    """

    what: ClassVar[str] = "plan"

    schema: Annotated[str, const(PLAN_SCHEMA)] = PLAN_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("The time of planning, ISO 8601 with a zone.")]
    fits: Annotated[bool, doc("Every GPU keeps its margin, and each rehearsed engine served.")]
    verdict: Annotated[str, doc("One sentence for people.")]
    model: Model
    machine: Machine
    workload: Workload
    backend: Backend
    promise: Annotated[Promise, doc("The limits and requests that every engine keeps.")]
    engines: Annotated[
        tuple[EnginePlan, ...], doc("One for each engine that will run."), Meta(min_length=1)
    ]
    host: Annotated[HostMemory, doc("Host memory of all engines together.")]
    throughput: Annotated[Throughput | None, doc("A forecast; null: no forecast.")] = None
    considered: Annotated[tuple[Candidate, ...], doc("All considered shapes.")] = ()
    reasons: Annotated[tuple[str, ...], doc("Reasons for a setting begin with its name.")] = ()
    warnings: tuple[str, ...] = ()
    remedies: Annotated[tuple[Remedy, ...], doc("Computed changes, cheapest first.")] = ()
    serve: Annotated[
        ServeCommand | None, doc("The command that serves the plan; null if turbofit serve cannot.")
    ] = None
    limit_costs: Annotated[
        tuple[LimitCost, ...], doc("Costs of common image limits, the largest limit first.")
    ] = ()
    usual_image: Annotated[
        UsualImage | UnsetType,
        doc("Absent unless the plan counts larger images than usual."),
    ] = UNSET
    footprint: Annotated[
        Footprint | UnsetType, doc("Only with the option for the least footprint.")
    ] = UNSET
    options: Annotated[
        dict[str, object] | UnsetType, doc("The given options, without model and machine.")
    ] = UNSET

    @property
    def tp(self) -> int:
        """The tensor parallelism of the largest engine."""
        return max(engine.settings.tp for engine in self.engines)

    @property
    def replicas(self) -> int:
        """The number of engines."""
        return len(self.engines)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The GPU indices of each engine."""
        return tuple(engine.gpus for engine in self.engines)

    @property
    def ledgers(self) -> tuple[GpuLedger, ...]:
        """The ledgers of all GPUs that the plan uses, in PCI order."""
        ledgers = (ledger for engine in self.engines for ledger in engine.ledgers)
        return tuple(sorted(ledgers, key=lambda ledger: ledger.index))

    @property
    def kv_tokens(self) -> int:
        """KV tokens of all engines together."""
        return sum(engine.kv.tokens for engine in self.engines)

    @property
    def rehearsal(self) -> Rehearsal | None:
        """The rehearsal with the gravest outcome; None without a rehearsal."""
        found = [engine.rehearsal for engine in self.engines if engine.rehearsal is not None]
        return min(found, key=lambda rehearsal: _GRAVE.index(rehearsal.outcome), default=None)

    @property
    def shares_cards(self) -> bool:
        """Whether a budget leaves memory of a GPU to other servers."""
        return any(ledger.beyond_budget for ledger in self.ledgers)

    def with_commands(self, commands: Sequence[Command]) -> Plan:
        """Return the plan with the command line of each engine."""
        engines = zip(self.engines, commands, strict=True)
        commanded = (replace(engine, command=command) for engine, command in engines)
        return replace(self, engines=tuple(commanded))

    def __repr__(self) -> str:
        """Return one line about the plan."""
        shape = f"{self.backend.name}, tp {self.tp} x {self.replicas}"
        cache = f"{self.kv_tokens:,} KV tokens: {'fits' if self.fits else 'does not fit'}"
        return f"<Plan: {self.model.name} on {self.machine.name}, {shape}, {cache}>"

    @property
    def title(self) -> str:
        """The names of the model, the machine and the engine, as a text."""
        return f"{self.model.name} on {self.machine.name} with {self.backend.name}"

    @property
    def why_engine(self) -> str:
        """The reason for the engine, without numbers; empty if the plan states no reason."""
        about = f"engine {self.backend.name}: "
        why = next((reason for reason in self.reasons if reason.startswith(about)), "")
        return why.partition(" (")[0].removeprefix("engine ")

    @property
    def takes_videos(self) -> bool:
        """Whether the engine accepts videos of this model, each in place of an image."""
        rule = self.model.image_rule if self.promise.limits.vision_unit is not None else None
        return self.backend.of_lmdeploy and rule is not None and rule.videos is not None

    @property
    def requests_at_once(self) -> int:
        """The number of requests that all engines together run at once."""
        return sum(engine.settings.max_batch_size for engine in self.engines)

    @property
    def prefix_caching(self) -> bool:
        """Whether the engines keep what they have read, for requests that begin alike."""
        return any(engine.settings.enable_prefix_caching for engine in self.engines)

    def may_evict(self) -> bool:
        """Return whether the KV cache of an engine may run out while requests generate."""
        return any(may_evict(engine.settings, engine.kv.tokens) for engine in self.engines)

    def engine_config(self) -> Any:
        """Return LMDeploy's config of the engines, if all have the same settings.

        Raises:
            DoesNotFitError: the engines would run out of memory.
            PackageError: LMDeploy is not installed.
            UsageError: the engines have different settings, or Transformers runs the model.
        """
        if not self.fits:
            raise DoesNotFitError(
                self.verdict,
                hint="plan.remedies has what helps; plan.engines[0].engine_config() is the config",
            )
        first, *others = self.engines
        if any(engine.lmdeploy_settings() != first.lmdeploy_settings() for engine in others):
            raise UsageError(
                f"the {self.replicas} engines of this plan have different settings",
                hint="plan.engines[0].engine_config() is the config of the first engine",
            )
        return first.engine_config()
