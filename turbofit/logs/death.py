"""Decides of what an engine died, by the events of its log and the exit of its process.

`kind_of_death` decides the kind (`core.engine_end.EndKind`) for `serve` and a rehearsal. They call
`death`, which adds the phase (`Course.phase`), the bytes and a message. `diagnose` takes these from
`death`, too, but `rules` and `out_of_memory` set the kind of its answer. Two kinds are in no log:
`serving.engine` gives ``stalled`` and ``refused`` to an engine that still runs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple, TypeVar

from msgspec.structs import replace

from turbofit.core.engine_end import AnyEnd, End, EndKind, Phase, exit_words, signal_of
from turbofit.core.plan import Plan, Settings
from turbofit.core.struct import Struct
from turbofit.core.units import format_bytes
from turbofit.logs import log_events as events
from turbofit.machine.torch_memory import TorchMemory
from turbofit.memory.account import Engine, LoggedSlab

_T = TypeVar("_T")
#: ``starting``: no engine exists yet. ``check`` (worst-case requests run) and ``ready`` are states
#: that `serve` sets: no line of a log shows them.
Stage = Literal["starting", "weights", "cache", "warm-up", "serving", "check", "ready"]
#: Events that end an engine by themselves.
Fault = (
    events.CudaError | events.LegacyCuda | events.CheckFailed | events.NcclError
    | TorchMemory
)  # fmt: skip

#: The states of a run in their order, each with the events that begin it. An event of an earlier
#: state changes nothing, since every rank prints it. After the first fault the state stays.
STATES: Final[dict[Stage, tuple[type[Struct], ...]]] = {
    "starting": (),
    "weights": (events.Starting, events.LoadingWeights),
    "cache": (events.CacheBudget, events.Slab, events.KvBlocks, events.CacheFrame),
    "warm-up": (events.WarmingUp, events.WarmupLengths),
    "serving": (events.WarmupFinished, events.ServerUp, events.Answered),
    "check": (),
    "ready": (),
}
_BEGINS: Final = {kind: stage for stage, kinds in STATES.items() for kind in kinds}
_ORDER: Final = tuple(STATES)
#: Kinds that have another name in `turbofit.diagnosis/1`. There a crash has the kind of its row in
#: `presets/causes.yaml`, such as ``crashed``; a crash without a row is ``unknown``.
IN_DIAGNOSIS: Final[dict[EndKind, str]] = {
    "host_memory": "host_out_of_memory",
    "hang": "start_hang",
    "stalled": "stands_still",
    "crash": "crashed",
}
_WHEN: Final[dict[str, str]] = {
    "starting": "while it started",
    "start": "while it started",
    "weights": "while it loaded weights",
    "cache": "when it allocated the cache",
    "warm-up": "in its warm-up",
    "vision": "when it encoded images",
    "text": "in a forward of the language model",
    "quantising": "while it quantised",
    "serving": "while it served",
    "check": "at a worst-case request",
    "ready": "while it served",
    "unknown": "(the log does not say where)",
}
#: The phase of an end, by the phase in a pretend GPU's account. Any other phase of an account is a
#: forward: of images or of text.
_PRETEND: Final[dict[str, Phase]] = {
    "import": "start", "context": "start", "weights": "weights", "prepare": "weights",
    "engine": "cache", "cache": "cache", "buffers": "cache", "warm-up": "warm-up",
    "after": "serving",
}  # fmt: skip
_VISION: Final = ("Vit", "vit", "Vision", "vision", "visual")
#: Phases, each with words of a Python frame's file name, function or source line. If frames have
#: words of several phases, the first of these phases counts. ``weights`` is before the forwards,
#: since a load also has frames in a model's files, and computes nothing. ``vision`` is before
#: ``text``, since a text model may call a vision tower, and no tower calls a text model.
_FRAMES: Final[tuple[tuple[Phase, tuple[str, ...]], ...]] = (
    ("quantising", ("lmdeploy/lite/",)),
    # LMDeploy's PyTorch engine makes its cache and warms up inside its own from_pretrained.
    ("cache", ("cache_engine", "build_cache", "allocate_kv_cache")),
    ("warm-up", ("agent.py warmup", "agent.py _warmup")),
    ("weights", ("from_pretrained", "load_state_dict", "load_pretrained", "load_checkpoint",
                 "load_model", "set_module_tensor", "model_loader", "load_file", "process_weight",
                 "module.py convert", "module.py _apply", "module.py to ", "module.py cuda ",
                 "module.py half ", "load_weight", "load_vl_model", "build_model")),
    ("warm-up", ("warmup", "warm_up", "graph_runner", "cudagraph")),
    ("vision", ("vision", "intern_vit", "visual", "clip_", "_clip", "clip.py", "siglip", "eva_clip",
                "moonvit", "patch_embed", "image_encoder", "encode_images", "extract_feature",
                "get_image_features", "lmdeploy/vl/",
                # Source lines that only Qwen's towers have: a tower packs the patches of all images
                # into one sequence without a batch.
                "cu_seqlens", "= blk(", "k.transpose(1, 2)", "attention(q, k, v", "attention(q_i")),
    ("unknown", ("eager_attention_forward",)),
    ("text", ("modeling_", "lm_head", "generate", "forward", "mlp", "self_attn", "down_proj",
              "silu")),
)  # fmt: skip
#: Folders of LMDeploy; all files of a folder have one phase.
_PARTS: Final = ("lmdeploy/vl/", "lmdeploy/lite/")


class Exit(NamedTuple):
    """How a process ended.

    ``code``: the exit status; a signal N gives -N or 128 + N. None: the process lives, but the loop
    of its engine ended, so that it answers no request. ``host_kills``: how many processes the
    kernel killed for lack of memory while the engine ran; None: unknown.
    """

    code: int | None
    host_kills: int | None = None


def after(stage: Stage, event: Struct) -> Stage:
    """Return the state after an event; the state never goes back."""
    new = _BEGINS.get(type(event), stage)
    return new if _ORDER.index(new) > _ORDER.index(stage) else stage


class Course:
    """What the events of a run show: the state that the run reached, and how the run ended."""

    def __init__(self, run: Iterable[Struct], stage: Stage = "starting") -> None:
        """Read the events up to the first fault; ``stage`` is the state before these events."""
        self.run = tuple(run)
        self.stage: Stage = stage
        self.fault: Fault | None = None
        #: The Python frames before the fault.
        self.stack: list[events.PythonFrame] = []
        #: Whether the log shows a forward with images.
        self.images = False
        for event in self.run:
            if (fault := _fault(event)) is not None:
                self.fault = fault
                break
            self.stage = after(self.stage, event)
            self.images |= isinstance(event, events.VisionFrame | events.VisionSetup)
            if isinstance(event, events.PythonError):
                self.stack = []  # these frames led to an exception that ended nothing
            self.stack += [event] if isinstance(event, events.PythonFrame) else []
        frames = (event.name for event in self.run if isinstance(event, events.Frame))
        #: The aborting thread's calls, innermost first.
        self.calls = [name for name in frames if not name.startswith("TM_")]
        self.call = next(iter(self.calls), "")

    def last(self, kind: type[_T]) -> _T | None:
        """Return the last event of a kind; None if there is none."""
        return next((event for event in reversed(self.run) if isinstance(event, kind)), None)

    def phase(self, plan: Plan | None, account: AnyEnd | None) -> Phase:
        """Return what the engine did at the fault.

        The phase of ``account``, the refused allocation, decides. Without an account the calls on
        the stack decide; without calls the reached state decides.
        """
        fault, pytorch = self.fault, plan is not None and plan.backend.is_pytorch
        if _stages(plan, fault):
            return "weights"
        if account is not None and account.phase and not pytorch:
            in_tower = _is_vision(account.where) or account.phase == "vision"
            return _PRETEND.get(account.phase, "vision" if in_tower else "text")
        if plan is not None and self.stage == "starting":
            return "weights" if pytorch else "start"
        by_torch = isinstance(fault, TorchMemory | events.LegacyCuda)
        named: Phase = phase_of(self.stack) if by_torch else "unknown"
        if named not in ("unknown", "text") or (named == "text" and plan is None):
            return named
        if isinstance(fault, events.LegacyCuda):
            # Weights are allocated in memory_utils.cu, all else through the allocator.
            bar = self.last(events.Converting)
            loads = "memory_utils" in fault.where or (bar is not None and not bar.done)
            early: Phase = "weights" if loads else "unknown"
            return early if self.stage in ("starting", "weights") else "serving"
        return self._by_state(plan)

    def _by_state(self, plan: Plan | None) -> Phase:
        """Return the phase that the aborting thread's calls and the reached state show."""
        stage, calls, in_tower = self.stage, self.calls, any(map(_is_vision, self.calls))
        torch = isinstance(self.fault, TorchMemory) and stage in ("weights", "cache")
        if plan is None and (stage == "starting" or torch):
            # A line that was written during the start does not show what torch has done since.
            return "unknown"
        if stage in ("serving", "check", "ready"):
            return "vision" if in_tower or (self.images and not calls) else "text"
        if stage == "warm-up" and in_tower:
            return "vision"
        # The log may announce the first request while a thread still allocates its workspaces.
        if stage == "warm-up" and calls and all("InternalThreadEntry" in name for name in calls):
            return "cache"
        # LMDeploy's own log level hides the warm-up's line, but a forward pass is on the stack.
        forward = any("orward" in name for name in calls)
        return "warm-up" if stage == "cache" and forward else stage


def _fault(event: Struct) -> Fault | None:
    """Return the fault in an event; None if the event cannot end an engine by itself."""
    if isinstance(event, events.PythonError):
        return TorchMemory(message=event.message) if event.out_of_memory else None
    return event if isinstance(event, Fault) else None


def _is_vision(name: str) -> bool:
    return any(word in name for word in _VISION)


def phase_of(stack: Sequence[events.PythonFrame]) -> Phase:
    """Return the phase that a stack's frames show; the program's own file name is ignored."""
    program = {frame.path for frame in stack if frame.function == "<module>"}
    frames, of_models = [], []
    for frame in stack:
        path = frame.path.replace("\\", "/")
        name = "" if frame.path in program else path.rpartition("/")[2]
        folder = next((part for part in _PARTS if part in path), "")
        frames.append(f"{folder} {name} {frame.function} {frame.code}".lower())
        # A forward in one of torch's layers shows no part of a model, since all parts use the
        # layers. Only language models have the gated activation.
        gated = frame.function.startswith("silu")
        of_models += [] if "/torch/" in path and not gated else frames[-1:]
    found = (
        phase
        for phase, text in _FRAMES
        for frame in (of_models if phase == "text" else frames)
        if any(word in frame for word in text)
    )
    return next(found, "unknown")


def last_words(fault: Struct | None, most: int = 300) -> str:
    """Return a fault's message; ``most``: the most characters for NCCL, torch and Python."""
    match fault:
        case events.CudaError():
            return f"CUDA {'driver ' if fault.driver else ''}error: {fault.message}"
        case events.LegacyCuda():
            return f"CUDA runtime error: {fault.message}"
        case events.CheckFailed():
            return f"check failed: {fault.message}"
        case events.NcclError() | TorchMemory():
            return fault.message[:most]
        case events.PythonError():
            return f"{fault.name}: {fault.message[:most]}"
    return ""


def kind_of_death(
    course: Course, account: AnyEnd | None, seen: Exit | None, pinned_call: str
) -> EndKind:
    """Return the kind of a death: by the fatal event of the engine's log, and then by its exit.

    Args:
        course: the run, read from its log.
        account: the allocation that a pretend GPU's account shows as refused.
        seen: the exit of the engine's process; None if nobody looked.
        pinned_call: the line of the engine's source that asks for page-locked host memory.
    """
    # A lack of cache, and a lost lock, end the PyTorch engine's server without another fault.
    raced = course.last(events.LostLock) if course.stage == "starting" else None
    alone = None if seen and seen.code is None else course.last(events.NoCache) or raced
    fatal = course.fault or course.last(events.HostKill) or alone
    last = course.run[-1] if course.run else None
    if fatal is None and seen is None and last == events.Backpressure(cause="memory"):
        return "hang"
    if account is not None:
        return "out_of_memory"
    kind = _kind_by_event(fatal, pinned_call)
    return kind if seen is None else _kind_by_exit(kind, seen)


def _kind_by_event(event: Struct | None, pinned_call: str) -> EndKind:
    """Return the kind of death that a fatal event shows by itself; ``crash`` for other events."""
    match event:
        case events.LostLock():
            return "raced"
        case events.CudaError(out_of_memory=True, call=call) if call and call == pinned_call:
            return "host_memory"
        case events.HostKill():
            return "host_memory"
        case events.NoCache() | TorchMemory():
            return "out_of_memory"
    return "out_of_memory" if getattr(event, "out_of_memory", False) else "crash"


def _kind_by_exit(by_event: EndKind, seen: Exit) -> EndKind:
    """Return the kind of death by the log's event, or by SIGKILL; ``unknown`` if they disagree.

    A lack of memory agrees with an abort, an exit with an error, or a process that still lives.
    """
    number = signal_of(seen.code)
    if by_event in ("out_of_memory", "host_memory"):
        agrees = seen.code is None or number == signal.SIGABRT or (seen.code != 0 and not number)
        return by_event if agrees else "unknown"
    killed: EndKind = "killed" if seen.host_kills == 0 else "host_memory"
    return killed if number == signal.SIGKILL else by_event


def death(
    run: Iterable[Struct] | Course,
    plan: Plan | None = None,
    account: AnyEnd | None = None,
    *,
    seen: Exit | None = None,
    known: tuple[Engine, Settings] | None = None,
) -> End:
    """Return why an engine died: kind, phase, call, bytes, and a message for people.

    Args:
        run: the events of the engine's log.
        plan: the plan that the engine ran, if there is one.
        account: the phase, the call and the bytes of the allocation that was refused, as the card's
          account shows them.
        seen: the exit of the engine's process; None if nobody looked.
        known: the engine, and its settings by the plan or by the log.
    """
    course = run if isinstance(run, Course) else Course(run)
    engine, settings = known or (None, Settings())
    kind = kind_of_death(course, account, seen, engine.pinned_call if engine else "")
    when = _WHEN[course.stage] + (f" (in {course.call})" if course.call else "")
    if kind == "hang":
        return _hang(course, engine, settings)
    if kind == "out_of_memory":
        return _ran_out(course, plan, account)
    if kind in ("killed", "host_memory"):
        return _of_host(course, plan, seen, when)
    if kind == "raced":
        # The engine tells its port under a lock. The server sometimes closes the lock before the
        # engine releases it. lmdeploy zmq_engine.py::ZMQMPEngine._start_mp_proc #bf32c0
        message = "LMDeploy's server and its engine lost each other while they started (EOFError)"
        return End(kind=kind, message=message)
    return _crashed(course, seen, kind, when)


def _crashed(course: Course, seen: Exit | None, kind: EndKind, when: str) -> End:
    """Return the end of an engine without a known cause: its exit and its last words."""
    words = last_words(course.fault or course.last(events.PythonError))
    loop = seen is not None and seen.code is None
    who = "the engine's loop" if loop else "the engine"
    exits = f" with {exit_words(seen.code)}" if seen and not loop else ""
    parts = [f"{who} ended {when}{exits}{f': {words}' if words else ''}"]
    if loop:
        parts.append("its server answers 503 until it is restarted")
    if kind == "unknown":
        parts.append("its log tells of a lack of memory, which ends no process in this way")
    return End(
        kind=kind,
        message="; ".join(parts),
        hint="turbofit doctor reads the kernel's log for errors of a card",
        where=course.call,
    )


def _ran_out(course: Course, plan: Plan | None, account: AnyEnd | None) -> End:
    """Return the end of an engine that ran out of GPU memory, with the bytes of the allocation."""
    fault, no_cache = course.fault, course.last(events.NoCache)
    hint = _hint(course, plan)
    if fault is None and no_cache is not None:
        message = (
            f"the engine found no memory for its {no_cache.what} when it had loaded the weights"
        )
        return End(kind="out_of_memory", phase="cache", message=message, hint=hint)
    torch = fault if isinstance(fault, TorchMemory) else None
    if _stages(plan, fault):
        account = None  # TurboMind's account does not include torch's memory
    refused = _refused(account or AnyEnd(), torch or TorchMemory())
    phase = course.phase(plan, account)
    call = refused.where or ("" if torch else course.call)
    when = _WHEN[phase]
    if isinstance(fault, events.LegacyCuda):
        call = call or fault.where
        when = when.replace(_WHEN["serving"], "after its cache was made")
    who = "the program" if torch is not None and plan is None else "the engine"
    message = f"{who} ran out of GPU memory {when}{f' (in {call})' if call else ''}"
    end = End(
        kind="out_of_memory", phase=phase, where=call, asked=refused.asked, left=refused.left,
        gpu=refused.gpu, missing=refused.missing, simulated=refused.simulated, hint=hint,
    )  # fmt: skip
    known = account is not None or plan is None
    allocation = _allocation_words(end, fault, known=known, staged=_stages(plan, fault))
    return replace(end, message=message + allocation, simulated=None)


def _refused(account: AnyEnd, torch: TorchMemory) -> AnyEnd:
    """Return the refused allocation, by the card's account or else by torch's own figures."""
    lacks = (account.missing, None if account.simulated else torch.missing)
    return replace(
        account,
        asked=torch.requested if account.asked is None else account.asked,
        left=torch.free if account.left is None else account.left,
        gpu=torch.gpu if account.gpu is None else account.gpu,
        missing=max((size for size in lacks if size is not None), default=None),
    )


def _allocation_words(end: End, fault: Fault | None, *, known: bool, staged: bool) -> str:
    """Return the last part of an end's message: the refused allocation, or the fault's message.

    ``known``: the bytes of the allocation are certain enough to show. ``staged``: torch ran out of
    memory while it held weights for TurboMind.
    """
    if known and end.asked and end.left is not None and end.gpu is not None:
        doing = ", and the pretend GPU refused (simulated)" if end.simulated else ""
        asked, left = format_bytes(end.asked), format_bytes(end.left)
        return f": it asked {asked} where {left} were left on GPU {end.gpu}{doing}"
    if fault is None or isinstance(fault, TorchMemory):
        staging = ": torch stages the weights on the first GPU" if staged else ""
        return f", asking {format_bytes(end.asked)}{staging}" if end.asked else ""
    return f": {last_words(fault)}"


def _stages(plan: Plan | None, fault: Struct | None) -> bool:
    """Return whether torch ran out of memory while it loaded weights for TurboMind."""
    turbomind = plan is not None and plan.backend.of_lmdeploy and not plan.backend.is_pytorch
    return turbomind and isinstance(fault, TorchMemory)


def _hint(course: Course, plan: Plan | None) -> str:
    """Return what helps against a lack of GPU memory; empty without a plan."""
    if plan is None:
        return ""
    if course.stage in ("starting", "weights"):
        return "more --tp, 4-bit weights (turbofit quantize makes them) or freer GPUs"
    margin = max(gpu.margin for gpu in plan.ledgers)
    return (
        "somebody else may have taken memory, or the plan counted too little: plan with a --margin "
        f"above {format_bytes(margin)}"
    )


def _of_host(course: Course, plan: Plan | None, seen: Exit | None, when: str) -> End:
    """Return the end of an engine that lacked host memory, or that SIGKILL ended.

    SIGKILL counts as a lack of host memory unless the kernel counts no kill for lack of memory.
    """
    fault, kill = course.fault, course.last(events.HostKill)
    hint = "more RAM or a higher limit of the container; fewer replicas"
    message = f"the engine was killed {when}: the kernel does so when host memory runs out"
    if plan is not None:
        hint = (
            f"free host memory; the plan counts {format_bytes(plan.host.pageable)} pageable and"
            f" {format_bytes(plan.host.pinned)} pinned"
        )
    if isinstance(fault, events.CudaError):
        message = f"the engine got no page-locked host memory {when}: {last_words(fault)}"
    elif kill is not None:
        size = f" of {format_bytes(kill.rss)}" if kill.rss is not None else ""
        of_group = "its container's or service's memory limit was reached"
        limit = of_group if kill.group else "the machine's RAM ran out"
        message = f"the kernel killed {kill.name or 'a process'}[{kill.pid}]{size}: {limit}"
    elif seen is not None and seen.host_kills == 0:
        message = (
            f"the engine was killed {when} by SIGKILL; the kernel counts no kill for lack of"
            " memory, so somebody did it"
        )
        return End(kind="killed", message=message)
    where = course.call if isinstance(fault, events.CudaError) else ""
    return End(kind="host_memory", phase="host", where=where, message=message, hint=hint)


def _hang(course: Course, engine: Engine | None, settings: Settings) -> End:
    """Return the end of a warm-up that waits for ever: its request does not fit into the cache.

    ``missing`` of the end has the bytes of the blocks that the cache lacks; None if the log does
    not say how large the cache and its blocks are.
    """
    budget, slab = course.last(events.CacheBudget), course.last(events.Slab)
    length = course.last(events.WarmupLength)
    wanted = length.tokens if length else 0
    if engine is not None and length is None:
        wanted = engine.forward_tokens(settings)
    holds, missing, ratio = "too few tokens", None, "raise --cache-max-entry-count"
    if engine is not None and slab is not None and budget is not None:
        shape = engine.logged_cache([LoggedSlab(slab.slab_size, slab.object_size)], settings)
        block = shape.block_tokens if shape else 0
        if shape is not None and block:
            tokens = shape.tokens(budget.budget)
            holds = f"{tokens:,} tokens"
            missing = max(0, -(-wanted // block) - tokens // block) * slab.object_size
            ratios = (n for n in range(1, 1000) if shape.tokens(budget.free * n // 1000) >= wanted)
            least = next(ratios, None) if missing else None
            ratio += f" to {least / 1000:.3f} at least" if least else ""
    message = (
        f"LMDeploy hangs in its warm-up: its cache holds {holds}, and a request of {wanted:,} waits"
        " for more room, for ever and without an error"
    )
    hint = f"{ratio}, lower --max-prefill-token-num or free GPU memory"
    return End(kind="hang", phase="warm-up", missing=missing, message=message, hint=hint)
