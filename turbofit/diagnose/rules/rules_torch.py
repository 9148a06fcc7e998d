"""Torch, Accelerate and Transformers: memory texts, offloading, tensors on two devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.units import GIB, MIB, format_bytes
from turbofit.diagnose.answer import Evidence, Holding, Missing, PhaseName
from turbofit.diagnose.lines.events import ModelLoaded, Offload, OtherDevices, TorchMemory
from turbofit.diagnose.rules.draft import Draft, evidence
from turbofit.diagnose.rules.rules_legacy import (
    blocks,
    cache_holders,
    cache_story,
    cards_story,
    double_start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import Mark
    from turbofit.diagnose.lines.events import PythonFrame

__all__ = ["torch_rules"]

#: Words in a frame's file name, function or source, in the order in which a class is looked for:
#: nothing is computed while loading, and a vision tower calls nothing of the language model.
_PHASES: Final[tuple[tuple[PhaseName, tuple[str, ...]], ...]] = (
    ("weights", ("from_pretrained", "load_state_dict", "load_pretrained", "load_checkpoint",
                 "load_model", "set_module_tensor", "model_loader", "load_file", "process_weight",
                 "module.py convert", "module.py _apply", "load_weight")),
    ("cache", ("cache_engine", "build_cache")),
    ("warm-up", ("warmup", "warm_up", "graph_runner", "cudagraph")),
    ("vision", ("vision", "intern_vit", "visual", "clip_", "_clip", "siglip", "eva_clip",
                "image_encoder", "encode_images", "extract_feature", "get_image_features")),
    ("text", ("modeling_", "lm_head", "generate", "forward", "mlp", "self_attn")),
)  # fmt: skip
#: Source of attention that holds the whole matrix.
_EAGER: Final = ("matmul", "softmax", "bmm", "baddbmm")
_WHEN: Final[dict[PhaseName, str]] = {
    "vision": "when images were encoded",
    "cache": "when the cache was made",
    "warm-up": "in the warm-up",
    "weights": "while weights were loaded",
    "text": "in a forward of the language model",
    "unknown": "(the log has no stack that says where)",
}


def torch_rules(case: LogCase) -> Iterator[Draft]:
    """All that torch and what is built on it say of memory and devices."""
    marks = case.facts.every(TorchMemory)
    if marks:
        yield _out_of_memory(case, *max(marks[:1], key=lambda pair: pair[1].figures))
    for mark, offload in case.facts.every(Offload)[:1]:
        yield _offload(mark, offload)
    for mark, devices in case.facts.every(OtherDevices)[:1]:
        yield _devices(case, mark, devices)


def _phase(stack: tuple[PythonFrame, ...]) -> PhaseName:
    """Which part of a run a stack is of."""
    frames = [
        f"{frame.path.rpartition('/')[2]} {frame.function} {frame.code}".lower() for frame in stack
    ]
    for phase, words in _PHASES:
        if any(word in frame for frame in frames for word in words):
            return phase
    return "unknown"


def _out_of_memory(case: LogCase, mark: Mark, memory: TorchMemory) -> Draft:
    phase = _phase(mark.stack)
    lines = [evidence(mark, "torch's own figures")]
    why = list(_figures(memory))
    if phase == "vision" and mark.stack and any(w in mark.stack[-1].code for w in _EAGER):
        why.append(
            "attention was computed with its whole matrix, which grows with the square of the"
            " image's patches: attn_implementation sdpa or flash_attention_2 does without"
        )
    others = sum(size for _, size in memory.others)
    held = list(_holders(mark, memory))
    found = blocks(case)
    if found is not None:
        lines[:0] = found.lines
        why.append(cache_story(found))
        why += cards_story(case, found)
        held += cache_holders(case, found)
    for told in (double_start(case), _loaded_twice(case)):
        if told:
            why.append(told[0])
            lines.append(told[1])
    unknown = [] if mark.stack else ["where: the log has no traceback before the error"]
    if _foreign(memory) and memory.gpu is not None:
        unknown.append(f"whether other cards are as full as GPU {memory.gpu}")
    if memory.total is None:
        unknown.append("the card's size and what was free: this torch does not print them")
    return Draft(
        kind="out_of_memory",
        phase=phase,
        what=f"torch ran out of GPU memory {_WHEN[phase]}"
        + (f", on GPU {memory.gpu} of those it saw" if memory.gpu is not None else ""),
        line=mark.line,
        why=tuple(why),
        held=tuple(held),
        missing=_missing(memory),
        unknown=tuple(unknown),
        evidence=tuple(sorted(lines, key=lambda one: one.line)),
        changes=_changes(case, phase, memory, others),
        planned=True,
        others=_foreign(memory),
    )


def _missing(memory: TorchMemory) -> Missing:
    """Asked less free, both rounded by torch to hundredths of their unit."""
    if memory.asked is None or memory.free is None:
        asked = f"; it asked {format_bytes(memory.asked)}" if memory.asked is not None else ""
        return Missing(bytes=None, basis="unknown", note=f"the text has not both figures{asked}")
    doubt = sum(_rounding(size) for size in (memory.asked, memory.free))
    short = memory.asked - memory.free
    if short <= 0:
        return Missing(
            bytes=None,
            basis="unknown",
            note=f"{format_bytes(memory.free)} were free, more than the"
            f" {format_bytes(memory.asked)} asked: a limit of the process, or others' memory came"
            " back meanwhile",
        )
    return Missing(
        bytes=short,
        basis="log",
        note=f"asked {format_bytes(memory.asked)}, free {format_bytes(memory.free)}",
        doubt=doubt,
    )


def _rounding(size: int) -> int:
    """Half a hundredth of the unit in which torch printed a size."""
    for unit in (GIB, MIB, 1024):
        if size >= unit:
            return unit // 200
    return 0


def _figures(memory: TorchMemory) -> Iterator[str]:
    if memory.cached is not None and memory.asked is not None and memory.cached >= memory.asked:
        yield (
            f"{format_bytes(memory.cached)} lay unused in torch's own cache, in pieces too small or"
            " of another size: fragmentation"
        )
    others = sum(size for _, size in memory.others)
    if others:
        yield f"other processes held {format_bytes(others)} of the card"
    if memory.total is not None and memory.process is not None and memory.free is not None:
        unseen = memory.total - memory.process - memory.free - others
        if unseen > GIB:
            yield (
                f"{format_bytes(unseen)} of the card are explained by nobody in this text: another"
                " process or container, or the driver"
            )


def _foreign(memory: TorchMemory) -> int:
    """Bytes of the card that the failing process did not hold."""
    if memory.total is None or memory.process is None or memory.free is None:
        return sum(size for _, size in memory.others)
    rest = memory.total - memory.process - memory.free
    return rest if rest > GIB // 4 else 0


def _holders(mark: Mark, memory: TorchMemory) -> Iterator[Holding]:
    lines = (mark.line,)
    if memory.process is not None:
        yield Holding(who="this process", bytes=memory.process, gpu=memory.gpu, lines=lines)
    elif memory.allocated is not None:
        who = "this process's tensors"
        yield Holding(who=who, bytes=memory.allocated, gpu=memory.gpu, lines=lines)
    for pid, size in memory.others:
        yield Holding(who=f"process {pid}", bytes=size, gpu=memory.gpu, lines=lines)


def _changes(case: LogCase, phase: PhaseName, memory: TorchMemory, others: int) -> tuple[str, ...]:
    changes = []
    if double_start(case):
        changes.append("start the engine once (plain python), not under torchrun")
    if _loaded_twice(case):
        changes.append("choose one: a whole model on each card, or one model sharded over them")
    if others > GIB // 4:
        pids = ", ".join(str(pid) for pid, _ in memory.others)
        changes.append(f"end what else holds the card (process {pids}), or plan for what is free")
    if phase == "weights":
        changes.append("16-bit or quantised weights, or more cards")
    elif phase == "vision":
        changes.append("fewer or smaller images: tiles or pixels a request")
    else:
        changes.append("batch 1, 16-bit weights, shorter prompts and fewer images")
    if memory.cached and memory.asked and memory.cached >= memory.asked:
        changes.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation")
    return tuple(changes)


def _loaded_twice(case: LogCase) -> tuple[str, Evidence] | None:
    """Whole models loaded side by side by one program that also shards each over all cards."""
    loads = case.facts.every(ModelLoaded)
    if len(loads) < 2:
        return None
    mark = loads[1][0]
    sharded = (
        ", and `device_map=auto` shards each over the same cards"
        if (case.facts.subject.auto_map)
        else ""
    )
    return (
        f"the program loaded the whole model {len(loads)} times{sharded}: replicas and shards at"
        " once, so every copy after the first meets cards that are already full",
        evidence(mark, "the model is loaded again"),
    )


def _offload(mark: Mark, offload: Offload) -> Draft:
    """The automatic device map met less free memory than the weights need."""
    count = len(offload.modules)
    named = ""
    if count:
        named = f" ({count} modules: {offload.modules[0]} … {offload.modules[-1]})"
    return Draft(
        kind="offload",
        phase="weights",
        what="the automatic device map found too little free GPU memory, wanted to put part of the"
        f" model on disk{named}, and was given no folder for that",
        line=mark.line,
        why=(
            "Accelerate divides the weights over the GPUs and the RAM that it sees at that moment;"
            " what is left goes to disk. It is a shortage of visible, free GPU memory, not of a"
            " folder",
            "so either cards are missing (fewer visible than believed, one that fell off the bus),"
            " or somebody else holds them",
        ),
        missing=Missing(
            bytes=None,
            basis="unknown",
            note="the error names modules, not sizes: what did not fit is at least their weights",
        ),
        unknown=("how many GPUs were visible, and how much of each was free",),
        evidence=(evidence(mark, "what was to be put on disk"),),
        changes=(
            "check the cards first: `turbofit doctor`, nvidia-smi -L, CUDA_VISIBLE_DEVICES",
            "merge the LoRA into the checkpoint first, where there is one: `turbofit merge BASE"
            " ADAPTER OUT` needs no GPU and about a gigabyte of RAM, and makes LLaVA's original"
            " format one that LMDeploy runs",
            "then `turbofit plan OUT` says which cards hold it, in place of the automatic map",
            "an offload_folder only hides it: layers on disk make each token take seconds",
        ),
        planned=True,
    )


def _devices(case: LogCase, mark: Mark, devices: OtherDevices) -> Draft:
    names = " and ".join(devices.devices) or "several devices"
    embeddings = "index_select" in devices.operator or "embedding" in devices.operator
    where = " in the embedding lookup" if embeddings else ""
    auto = case.facts.subject.auto_map
    lines = [evidence(mark, "the operator and its devices")]
    if auto:
        tells = "automatic placement"
        lines.append(Evidence(line=auto[0], text=auto[1].strip()[:240], tells=tells))
    return Draft(
        kind="device_mismatch",
        phase="configuration",
        what=f"an operator got tensors of {names}{where}: the model's parts were spread over cards"
        " without regard to how data flows between them",
        line=mark.line,
        why=(
            'device_map="auto" places modules by size alone; inputs stay on the first card while'
            " the embeddings, or what merges image and text, may be on another",
            "it is no shortage of memory: the weights were placed",
        ),
        unknown=() if auto else ('whether device_map="auto" placed it: the log does not say',),
        evidence=tuple(sorted(lines, key=lambda one: one.line)),
        changes=(
            "use one card where the model fits on one: CUDA_VISIBLE_DEVICES=0, and a replica on"
            " each other card",
            "where it does not: tensor parallelism (LMDeploy's tp), which splits every layer, or a"
            " device map with vision tower and embeddings on the card of the inputs",
        ),
        planned=True,
    )
