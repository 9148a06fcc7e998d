"""The settings of a TurboMind run, from its command line and from what its log gives away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.memory.account import default_batch_size
from turbofit.memory.turbomind.cache import block_bytes
from turbofit.memory.turbomind.weights import load_constants
from turbofit.observe.log_events import CacheBudget, Slab, WarmupLengths
from turbofit.tuner.search.shapes import dtype_for

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu
    from turbofit.core.model import Model
    from turbofit.diagnose.facts import LogFacts

_DEFAULT_PREFILL = 8192
#: `quant_policy` of TurboMind: 16-bit, int4, int8.
_POLICIES = (0, 8, 4)


class LoggedRun(Struct):
    """Settings, what was assumed for want of a line, and whether the log contradicts them."""

    settings: Settings
    assumed: tuple[str, ...]
    contradiction: str = ""


def run_settings(facts: LogFacts, model: Model, gpu: Gpu | None) -> LoggedRun:
    """What the run was started with; LMDeploy's defaults where nothing says otherwise."""
    given = {
        name: value
        for name, value in facts.subject.options.items()
        if name in Settings.__struct_fields__
    }
    assumed: list[str] = []
    values: dict[str, Any] = dict(given)
    if "tp" not in values:
        values["tp"] = max(1, len(facts.every(CacheBudget)))
        assumed.append(f"tp {values['tp']}: as many ranks printed their cache")
    _lengths(facts, values, assumed, gpu)
    session = facts.session_limit
    if session is not None:
        values["session_len"] = session
    elif "session_len" not in values:
        values["session_len"] = model.text.max_position_embeddings
        assumed.append(f"session_len {values['session_len']}: the model's own")
    if gpu is not None and "dtype" not in values:
        values["dtype"] = dtype_for(model, [gpu])[0]
    elif "dtype" not in values:
        values["dtype"] = "float16" if model.quantization else model.dtype
        if values["dtype"] not in ("float16", "bfloat16"):
            values["dtype"] = "bfloat16"
    values.pop("cache_max_entry_count", None)
    settings = Settings(**values)
    return _with_kv_type(facts, model, settings, assumed, given)


def _lengths(facts: LogFacts, values: dict[str, Any], assumed: list[str], gpu: Gpu | None) -> None:
    """Prefill and batch: the last warm-up length is their sum, unless it is longer than a session.

    A session that is shorter hides the sum: then both are LMDeploy's defaults.
    """
    batch = values.get("max_batch_size")
    prefill = values.get("max_prefill_token_num")
    mark = facts.first(WarmupLengths)
    longest = 0
    if mark and isinstance(mark.event, WarmupLengths):
        longest = max(mark.event.lengths)
    known = longest and longest not in load_constants().warmup_lengths
    if batch is None:
        by_name = default_batch_size(gpu.name) if gpu else default_batch_size("")
        batch = by_name
        if known:
            rest = longest - (prefill or _DEFAULT_PREFILL)
            batch = rest if 0 < rest <= 4096 else by_name
        values["max_batch_size"] = batch
        assumed.append(f"max_batch_size {batch}")
    if prefill is None:
        prefill = longest - batch if known and longest > batch else _DEFAULT_PREFILL
        values["max_prefill_token_num"] = prefill
        if prefill != _DEFAULT_PREFILL:
            assumed.append(f"max_prefill_token_num {prefill}")


def _with_kv_type(
    facts: LogFacts, model: Model, settings: Settings, assumed: list[str], given: dict[str, object]
) -> LoggedRun:
    """The KV type follows from the size of a block, which the log prints."""
    from msgspec.structs import replace

    mark = facts.first(Slab)
    if not mark or not isinstance(mark.event, Slab):
        return LoggedRun(settings=settings, assumed=tuple(assumed))
    size = mark.event.object_size
    policies = [settings.quant_policy] if "quant_policy" in given else list(_POLICIES)
    for policy in policies:
        candidate = replace(settings, quant_policy=policy)
        if block_bytes(model.text, candidate) == size:
            return LoggedRun(settings=candidate, assumed=tuple(assumed))
    return LoggedRun(
        settings=settings,
        assumed=tuple(assumed),
        contradiction=f"a KV block of {size} bytes is not what {model.name} has at tp "
        f"{settings.tp}: the model or tp was another",
    )
