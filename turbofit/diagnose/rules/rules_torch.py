"""Torch, Accelerate and Transformers: memory texts, offloading, tensors on two devices."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.diagnose.answer import Evidence, Holding, Missing
from turbofit.diagnose.rules.causes import less_memory
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.rules_legacy import (
    START_ONCE,
    blocks,
    cache_holders,
    cache_story,
    double_start,
)
from turbofit.machine.presets import context_bytes
from turbofit.observe.log_events import CONTEXT, ModelLoaded, PythonFrame, TorchMemory
from turbofit.observe.stages import Phase, out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent

#: A tensor of a forward is rarely as large.
_ONE_TENSOR: Final = 4 * GIB
#: Of Transformers alone, which takes the option; torch's own call is sdpa already.
_WITHOUT: Final = ": attn_implementation sdpa or flash_attention_2 does without"
#: Words in a frame's file name, function or source, in the order in which a phase is looked for:
#: nothing is computed while loading, and a vision tower calls nothing of the language model.
_PHASES: Final[tuple[tuple[Phase, tuple[str, ...]], ...]] = (
    ("quantising", ("lmdeploy/lite/",)),
    # LMDeploy's PyTorch engine makes its cache and warms up inside its own from_pretrained.
    ("cache", ("cache_engine", "build_cache", "allocate_kv_cache")),
    ("warm-up", ("agent.py warmup", "agent.py _warmup")),
    ("weights", ("from_pretrained", "load_state_dict", "load_pretrained", "load_checkpoint",
                 "load_model", "set_module_tensor", "model_loader", "load_file", "process_weight",
                 "module.py convert", "module.py _apply", "load_weight", "load_vl_model",
                 "build_model")),
    ("warm-up", ("warmup", "warm_up", "graph_runner", "cudagraph")),
    ("vision", ("vision", "intern_vit", "visual", "clip_", "_clip", "clip.py", "siglip", "eva_clip",
                "moonvit", "patch_embed", "image_encoder", "encode_images", "extract_feature",
                "get_image_features", "lmdeploy/vl/",
                # Qwen's towers pack the patches of all images into one sequence without a batch.
                "cu_seqlens", "= blk(", "k.transpose(1, 2)", "attention(q, k, v", "attention(q_i")),
    ("text", ("modeling_", "lm_head", "generate", "forward", "mlp", "self_attn")),
)  # fmt: skip
#: An option in a log, and how advice for it begins, which is followed already.
_IN_USE: Final = ("expandable", "PYTORCH_CUDA_ALLOC_CONF")
#: Phases in which a tensor larger than the card needs a smaller input: no share is enough.
_FORWARDS: Final = ("vision", "text", "warm-up")
#: Calls that hold the whole matrix of attention, torch's own as well where it has no fused kernel.
_EAGER: Final = ("matmul", "softmax", "bmm", "baddbmm", "scaled_dot_product_attention")
_FOLDERS: Final = {
    "lmdeploy/lite/": "lmdeploy-lite", "lmdeploy/pytorch/": "lmdeploy-pytorch",
}  # fmt: skip
#: How to tell a server's processes from others.
_HOW: Final = (
    "To tell: start the server, and compare the pids of `docker top NAME` (or of `pgrep -af"
    " lmdeploy`) with those of `nvidia-smi --query-compute-apps=pid,used_memory --format=csv` on"
    " the host"
)
#: Folders of LMDeploy that tell a phase by themselves.
_PARTS: Final = ("lmdeploy/vl/", "lmdeploy/lite/")
_SEPARATORS: Final = re.compile(r"[/\\]")
#: Its layers are everybody's: a forward of theirs says of no model which part it is.
_TORCH: Final = re.compile(r"[/\\]torch[/\\]")


def torch_rules(case: LogCase) -> Iterator[RuleAnswer]:
    for mark in case.event.marks:
        if isinstance(mark.event, TorchMemory):
            yield _out_of_memory(case, mark, mark.event)
            return


def _out_of_memory(case: LogCase, mark: LogEvent, memory: TorchMemory) -> RuleAnswer:
    phase = phase_of(mark.stack)
    program = program_of(case, mark.stack)
    if program == "lmdeploy-lite":
        phase = "quantising"
    lines, why = [evidence(mark, "torch's own figures")], list(_figures(case, memory, program))
    if phase != "quantising":
        why += _whole_matrix(mark, memory, phase)
    holdings = list(_holders(case, mark, memory))
    kv_blocks = blocks(case)
    if kv_blocks is not None:
        lines[:0] = kv_blocks.lines
        why += cache_story(case, kv_blocks)
        holdings += cache_holders(kv_blocks)
    for reason in filter(None, (double_start(case), _loaded_twice(case))):
        why.append(reason[0])
        lines.append(reason[1])
    card = f", on GPU {memory.gpu} of those it saw" if memory.gpu is not None else ""
    return RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=f"{out_of_memory('torch', phase)}{card}",
        line=mark.line,
        why=tuple(why),
        held=tuple(holdings),
        missing=missing_of(memory),
        unknown=tuple(_unknown(case, mark, memory, phase)),
        evidence=tuple(sorted(lines, key=lambda row: row.line)),
        changes=_changes(case, phase, memory, program),
        planned=True,
        others=_foreign(case, memory),
    )


def _whole_matrix(mark: LogEvent, memory: TorchMemory, phase: Phase) -> Iterator[str]:
    """That attention held its whole matrix, where the call or the size asked tells it."""
    fused = any("scaled_dot_product_attention" in frame.code for frame in mark.stack)
    without = "" if fused else _WITHOUT
    whole = bool(mark.stack) and any(call in mark.stack[-1].code for call in _EAGER)
    if phase == "vision" and whole:
        yield (
            "attention was computed with its whole matrix, which grows with the square of the"
            f" image's patches{without}"
        )
    elif phase != "cache" and (memory.requested or 0) > max(memory.allocated or 0, _ONE_TENSOR):
        yield (
            f"it asked {format_bytes(memory.requested or 0)} at once, more than the program had"
            " allocated in all, as attention with its whole matrix does, which grows with the"
            f" square of the tokens or patches{without}"
        )


def _unknown(case: LogCase, mark: LogEvent, memory: TorchMemory, phase: Phase) -> Iterator[str]:
    if not mark.stack and phase == "unknown":
        yield "where: the log has no traceback before the error"
    yield from _doubts(case, memory)
    if _foreign(case, memory) and memory.gpu is not None:
        yield f"whether other cards are as full as GPU {memory.gpu}"
    if memory.total is None:
        yield "the card's size and what was free: this torch does not print them"


def missing_of(memory: TorchMemory) -> Missing:
    """Asked less free, both rounded by torch to hundredths of their unit."""
    if memory.requested is None or memory.free is None:
        allocation = (
            f"; it asked {format_bytes(memory.requested)}" if memory.requested is not None else ""
        )
        return Missing(
            bytes=None, basis="unknown", note=f"the text has not both figures{allocation}"
        )
    doubt = sum(_rounding(size) for size in (memory.requested, memory.free))
    short = memory.requested - memory.free
    if short <= 0:
        return Missing(
            bytes=None,
            basis="unknown",
            note=f"{format_bytes(memory.free)} were free, more than the"
            f" {format_bytes(memory.requested)} asked: a limit of the process, or others' memory"
            " came back meanwhile",
        )
    return Missing(
        bytes=short,
        basis="log",
        note=f"asked {format_bytes(memory.requested)}, free {format_bytes(memory.free)}",
        doubt=doubt,
    )


def _rounding(size: int) -> int:
    """Half a hundredth of the unit in which torch printed a size."""
    for unit in (GIB, MIB, 1024):
        if size >= unit:
            return unit // 200
    return 0


def _figures(case: LogCase, memory: TorchMemory, program: str) -> Iterator[str]:
    """What the figures of the text say, one sentence each."""
    if memory.limit is not None:
        yield (
            f"torch was allowed {format_bytes(memory.limit)} of the card"
            " (set_per_process_memory_fraction, or a program's own limit): that limit was full"
        )
    if memory.total is not None and (memory.allocated or 0) > memory.total:
        yield (
            f"torch had {format_bytes(memory.allocated or 0)} allocated on a card of"
            f" {format_bytes(memory.total)}: the driver of Windows or WSL had moved memory to the"
            " host, which is many times slower"
        )
    if _is_fragmented(memory):
        yield (
            f"{format_bytes(memory.cached or 0)} lay unused in torch's own cache, in pieces too"
            " small or of another size: fragmentation"
        )
    if memory.outside_torch:
        engine = (
            ", and what an engine such as TurboMind, where one ran, allocates itself (its weights"
            " and its KV cache)"
        )
        yield (
            f"{format_bytes(memory.outside_torch)} of what this process held was allocated outside"
            f" torch: CUDA's context and libraries{engine if program == 'other' else ''}"
        )
    yield from _of_others(case, memory)


def _of_others(case: LogCase, memory: TorchMemory) -> Iterator[str]:
    others = sum(size for _, size in memory.others)
    if others and not _unclear(case, memory):
        yield f"other processes held {format_bytes(others)} of the card"
    nobody = _unexplained(case, memory)
    if nobody > GIB:
        least = "" if memory.context else "at least "
        yield (
            f"{least}{format_bytes(nobody)} of the card are explained by nobody in this text:"
            " another process or container, or the driver"
        )


def _is_fragmented(memory: TorchMemory) -> bool:
    cached, requested = memory.cached, memory.requested
    return cached is not None and requested is not None and cached >= requested > 0


def _changes(case: LogCase, phase: Phase, memory: TorchMemory, program: str) -> tuple[str, ...]:
    if phase in _FORWARDS and (memory.requested or 0) > (memory.total or math.inf):
        return less_memory(program, "oversized")
    changes = [START_ONCE] if double_start(case) else []
    if _loaded_twice(case):
        changes.append(
            "load the model once; over several cards choose one: a whole model on each card, or one"
            " model sharded over them"
        )
    changes += _what_to_end(case, memory)
    changes += less_memory(program, phase)
    if memory.outside_torch and program == "other":
        changes.append(
            "a lower cache_max_entry_count, if LMDeploy ran: it leaves more for what comes after"
            " the cache"
        )
    # Not under WSL and Windows, where it is said to fail.
    if _is_fragmented(memory) and memory.process is not None:
        changes.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation")
    fact, advice = _IN_USE
    in_use = fact in case.facts.subject.facts
    return tuple(change for change in changes if not (in_use and change.startswith(advice)))


def _loaded_twice(case: LogCase) -> tuple[str, Evidence] | None:
    """Whole models loaded by one program, more often than a launcher started the program.

    A bar that is drawn again at its end, in the next line, is the same load.
    """
    marks = [mark for mark, _ in case.facts.every(ModelLoaded)]
    loads = [now for before, now in pairwise(marks) if now.line - before.line > 1]
    ranks = case.facts.subject.ranks
    if len(loads) + 1 <= (ranks[0] if ranks else 1) or not loads:
        return None
    sharded = (
        ", and `device_map=auto` shards each over the same cards"
        if (case.facts.subject.auto_map)
        else ""
    )
    return (
        f"the program loaded the whole model {len(loads) + 1} times{sharded}: replicas, or"
        " replicas and shards at once, so every copy after the first meets cards that are already"
        " full",
        evidence(loads[0], "the model is loaded again"),
    )


def _unclear(case: LogCase, memory: TorchMemory) -> bool:
    """Whether this process may be one of those that the text lists by pid.

    LMDeploy allocates outside torch, so that torch's figures do not tell which of two it is.
    """
    return not memory.named or (
        memory.pid is not None
        and case.facts.subject.of_lmdeploy
        and any(size > (memory.process or 0) for _, size in memory.others)
    )


def _holders(case: LogCase, mark: LogEvent, memory: TorchMemory) -> Iterator[Holding]:
    """Each process with its bytes, as sure as the text is."""
    lines, gpu = (mark.line,), memory.gpu
    either = _unclear(case, memory)
    if either:
        known = () if memory.pid is None else ((memory.pid, memory.process or 0),)
        for pid, size in (*known, *memory.others):
            yield Holding(
                who=f"process {pid}: this one or another", bytes=size, gpu=gpu, lines=lines
            )
        return
    if memory.process is not None:
        listed = "" if memory.pid is None else f" (process {memory.pid} of the text)"
        yield Holding(who=f"this process{listed}", bytes=memory.process, gpu=gpu, lines=lines)
    elif memory.allocated is not None:
        yield Holding(who="this process's tensors", bytes=memory.allocated, gpu=gpu, lines=lines)
    for pid, size in memory.others:
        yield Holding(who=f"process {pid}", bytes=size, gpu=gpu, lines=lines)


def _unexplained(case: LogCase, memory: TorchMemory) -> int:
    """Bytes of the card that no process of the text explains, a CUDA context of this one aside.

    Up to torch 2.0 the process's figure leaves its context out. So much of the rest as a context
    can take counts as one: a card shared with something that small is planned as an empty one.
    """
    if memory.total is None or memory.process is None or memory.free is None:
        return 0
    rest = memory.total - memory.process - memory.free - sum(size for _, size in memory.others)
    if memory.context:
        return max(0, rest)
    if rest <= CONTEXT:
        return 0
    return rest - (context_bytes(case.gpu)[0] if case.gpu else CONTEXT)


def _foreign(case: LogCase, memory: TorchMemory) -> int:
    """Bytes of the card that a plan must do without; none where they may be this process's.

    What is unclear counts as this process's: the plan is for the card without it, and says so.
    """
    if _unclear(case, memory):
        return 0
    rest = sum(size for _, size in memory.others) + _unexplained(case, memory)
    return rest if rest > GIB // 4 else 0


def _doubts(case: LogCase, memory: TorchMemory) -> Iterator[str]:
    """Both readings of a pid, and how to tell them apart."""
    pids = ", ".join(str(pid) for pid, _ in memory.others)
    if _unclear(case, memory) and memory.pid is None:
        yield (
            f"which of the processes {pids} is this one: torch lists every process of the card and"
            f" names none as this one. The plan is for the card without others. {_HOW}"
        )
    elif _unclear(case, memory):
        yield (
            f"which process is this one: {memory.pid} by torch's figures, or {pids}, since LMDeploy"
            f" allocates outside torch. The plan is for the card without others. {_HOW}"
        )
    elif memory.pid is not None and memory.outside_torch:
        yield (
            f"whether process {memory.pid} is this server. Torch lists every process of the card:"
            " the only one is this one, under the host's pid if it ran in a container, and to end"
            " it ends the server. It is another program only if the driver did not list this one."
            f" {_HOW}"
        )


def _what_to_end(case: LogCase, memory: TorchMemory) -> Iterator[str]:
    """Others that hold the card: always with the condition that they are others."""
    others = sum(size for _, size in memory.others)
    if others <= GIB // 4:
        return
    pids = ", ".join(str(pid) for pid, _ in memory.others)
    if _unclear(case, memory):
        yield (
            "tell this server's processes from others first (see what is unknown); end a process"
            " only if it is another program's, or plan for what is free"
        )
    else:
        yield (
            f"end what else holds the card (process {pids}) if it is no part of this server, or"
            " plan for what is free"
        )


def phase_of(stack: tuple[PythonFrame, ...]) -> Phase:
    """The phase; the name of the program itself says nothing."""
    program = {frame.path for frame in stack if frame.function == "<module>"}
    frames, of_models = [], []
    for frame in stack:
        name = "" if frame.path in program else _SEPARATORS.split(frame.path)[-1]
        folder = next((one for one in _PARTS if one in frame.path), "")
        frames.append(f"{folder} {name} {frame.function} {frame.code}".lower())
        if not _TORCH.search(frame.path):
            of_models.append(frames[-1])
    for phase, text in _PHASES:
        searched = of_models if phase == "text" else frames
        if any(word in frame for frame in searched for word in text):
            return phase
    return "unknown"


def program_of(case: LogCase, stack: tuple[PythonFrame, ...]) -> str:
    """The program that ran out, as the table of what takes less memory names it."""
    paths = [frame.path.replace("\\", "/") for frame in stack]
    for folder, name in _FOLDERS.items():
        if any(folder in path for path in paths):
            return name
    # TurboMind computes without torch: what torch allocates beside it is its front end's.
    return "lmdeploy-lite" if case.facts.subject.quantises else "other"
