"""The rule for torch's out-of-memory text: its figures, the card's holders, and advice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from turbofit.core.units import GIB, format_bytes
from turbofit.diagnose.answer import Holding, Missing
from turbofit.diagnose.rules.causes import less_memory
from turbofit.diagnose.rules.copies import with_copies
from turbofit.diagnose.rules.draft import RuleAnswer, evidence
from turbofit.diagnose.rules.logged_cache import logged_cache, lower_ratio, with_cache
from turbofit.observe.log_events import CONTEXT, PythonFrame, TorchMemory
from turbofit.observe.stages import Phase, out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.event import LogEvent
    from turbofit.diagnose.subject import FactCollector

#: Fewer bytes of other processes are not reported.
_SMALL: Final = GIB // 4
#: A tensor of a forward pass rarely has more bytes.
_ONE_TENSOR: Final = 4 * GIB
#: Words in a frame's file name, function or source. Phases are searched in this order, because a
#: load computes nothing, and a vision tower does not call the language model.
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
#: Calls that store the whole attention matrix; torch's own call does so without a fused kernel.
_EAGER: Final = ("matmul", "softmax", "bmm", "baddbmm", "scaled_dot_product_attention")
#: Phases that compute no attention over a long sequence.
_NO_ATTENTION: Final = ("cache", "quantising")
#: LMDeploy's folders, and the name of each program in the table of less memory.
_FOLDERS: Final = {
    "lmdeploy/pytorch/": "lmdeploy-pytorch", "lmdeploy/lite/": "lmdeploy-lite",
    "lmdeploy/": "lmdeploy",
}  # fmt: skip
#: What to send if the log is only an error text.
_SEND: Final = (
    'paste the line "CUDA out of memory. Tried to allocate …" as a whole: its figures say who held'
    ' the card; with the lines before it from "Traceback (most recent call last)" on, which say'
    " where it ran out"
)
#: Folders of LMDeploy whose name alone determines a phase.
_PARTS: Final = ("lmdeploy/vl/", "lmdeploy/lite/")


def torch_rules(case: LogCase) -> Iterator[RuleAnswer]:
    for mark in case.event.marks:
        if isinstance(mark.event, TorchMemory):
            yield _out_of_memory(case, mark, mark.event)
            return


def _out_of_memory(case: LogCase, mark: LogEvent, memory: TorchMemory) -> RuleAnswer:
    program = program_of(mark.stack, case.facts.subject)
    phase = "quantising" if program == "lmdeploy-lite" else phase_of(mark.stack)
    card = "" if memory.gpu is None else f", on GPU {memory.gpu} of those it saw"
    answer = RuleAnswer(
        kind="out_of_memory",
        phase=phase,
        what=out_of_memory("the program", phase) + card,
        line=mark.line,
        why=(*_figures(memory), *_whole_matrix(mark, memory, phase, program)),
        held=tuple(_holders(case, mark, memory)),
        missing=missing_of(memory),
        send=_send(case, mark, memory),
        unknown=tuple(_unknown(case, mark, memory)),
        evidence=(evidence(mark, "torch's own figures"),),
        changes=(*_end_others(memory), *_changes(case, phase, memory, program)),
        planned=True,
        by_others=_by_others(case, memory),
    )
    return with_cache(case, with_copies(case, mark, memory, answer), logged_cache(case))


def _whole_matrix(mark: LogEvent, memory: TorchMemory, phase: Phase, program: str) -> Iterator[str]:
    """Yields that attention stored its whole matrix, by its frame or by its request's size."""
    eager = bool(mark.stack) and any(call in mark.stack[-1].code for call in _EAGER)
    large = (memory.requested or 0) > max(memory.allocated or 0, _ONE_TENSOR)
    if (phase == "vision" and eager) or (large and phase not in _NO_ATTENTION):
        fused = "" if program.startswith("lmdeploy") else "; a fused attn_implementation has none"
        yield (
            "it asked for attention's whole matrix, by the call or by the size, which grows with"
            f" the square of the tokens or patches{fused}"
        )


def _by_others(case: LogCase, memory: TorchMemory) -> int:
    """Bytes of other processes on the card; 0 if few, or if the text does not tell this process."""
    rest = _listed(memory) + _unexplained(memory)
    return rest if rest > _SMALL and _names_this(case, memory) else 0


def _names_this(case: LogCase, memory: TorchMemory) -> bool:
    """Whether the text tells this process from the others on the card.

    LMDeploy also allocates outside torch: torch's figures do not tell it from a larger process.
    """
    larger = any(size > (memory.process or 0) for _, size in memory.others)
    guessed = memory.pid is not None and case.facts.subject.of_lmdeploy and larger
    return memory.named and not guessed


def _listed(memory: TorchMemory) -> int:
    return sum(size for _, size in memory.others)


def _unexplained(memory: TorchMemory) -> int:
    """Bytes of the card that no process in the text explains, without one context of this process.

    Up to torch 2.0 the process's figure does not include its context: so much of the rest counts
    as one.
    """
    if memory.total is None or memory.process is None or memory.free is None:
        return 0
    rest = memory.total - memory.process - memory.free - _listed(memory)
    return max(0, rest if memory.context else rest - CONTEXT)


def _unknown(case: LogCase, mark: LogEvent, memory: TorchMemory) -> Iterator[str]:
    """Yields the questions that the text does not answer."""
    if not mark.stack:
        yield "where: the log has no traceback before the error"
    if not _names_this(case, memory):
        yield "which of these processes is this server: torch lists them by their pid on the host"


def _send(case: LogCase, mark: LogEvent, memory: TorchMemory) -> tuple[str, ...]:
    """What would tell where a text that stands alone ran out, and who held the card."""
    if mark.stack:
        return ()
    if case.model is None:
        return (f"name the model with --model, and {_SEND}",)
    bare = memory.requested is None and not case.facts.subject.of_lmdeploy
    return (_SEND,) if bare else ()


def missing_of(memory: TorchMemory) -> Missing:
    """Requested minus free bytes; torch rounds both to hundredths of their unit."""
    if memory.missing is not None:
        requested, free = format_bytes(memory.requested or 0), format_bytes(memory.free or 0)
        return Missing(bytes=memory.missing, basis="log", note=f"asked {requested}, free {free}")
    note = "the text has not both figures"
    if memory.requested is not None:
        note = f"{note}; it asked {format_bytes(memory.requested)}"
        if memory.free is not None:
            note = (
                f"{format_bytes(memory.free)} were free, more than the"
                f" {format_bytes(memory.requested)} asked: a limit of the process, or others'"
                " memory came back meanwhile"
            )
    return Missing(bytes=None, basis="unknown", note=note)


def _figures(memory: TorchMemory) -> Iterator[str]:
    if _in_pieces(memory):
        yield (
            f"{format_bytes(memory.cached or 0)} lay unused in torch's own cache, in pieces too"
            " small or of another size: fragmentation"
        )
    if memory.outside_torch:
        yield (
            f"{format_bytes(memory.outside_torch)} of what this process held was allocated outside"
            " torch: CUDA's context, kernels and libraries, and what an engine that computes"
            " without torch, where one ran, allocates itself (its weights and its KV cache)"
        )
    if _unexplained(memory) > GIB:
        yield (
            f"at least {format_bytes(_unexplained(memory))} of the card are explained by nobody in"
            " this text: another process or container, or the driver"
        )


def _in_pieces(memory: TorchMemory) -> bool:
    """Whether torch's own cache had the bytes, in pieces that did not do."""
    return bool(memory.cached and memory.requested and memory.cached >= memory.requested)


def _end_others(memory: TorchMemory) -> Iterator[str]:
    """Yields advice on processes that hold the card, always on condition that they are others'."""
    if _listed(memory) > _SMALL:
        pids = ", ".join(str(pid) for pid, _ in memory.others)
        yield (
            f"end what else holds the card (process {pids}) if it is no part of this server, or"
            " plan for what is free"
        )


def _changes(case: LogCase, phase: Phase, memory: TorchMemory, program: str) -> Iterator[str]:
    """Yields changes that leave more of the card free for this run, the surest first."""
    if phase != "weights" and (memory.requested or 0) > (memory.total or math.inf):
        yield from less_memory(program, "oversized")
        return
    if logged_cache(case) is not None and phase != "weights":
        yield from lower_ratio(case)
    else:
        yield from less_memory(program, phase)
    advised = "expandable" in case.facts.subject.facts
    # Not under WSL and Windows, which tell no process: there it is said to fail.
    if _in_pieces(memory) and memory.process is not None and not advised:
        yield "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True against fragmentation"


def _holders(case: LogCase, mark: LogEvent, memory: TorchMemory) -> Iterator[Holding]:
    """Yields each process with its bytes, as certain as the text is."""
    this, held = "this process", memory.process
    if not _names_this(case, memory):
        this = f"process {memory.pid}"
    elif memory.pid is not None:
        this = f"this process (process {memory.pid} of the text)"
    elif held is None:
        this, held = "this process's tensors", memory.allocated
    sizes = {this: held} | {f"process {pid}": size for pid, size in memory.others}
    for who, size in sizes.items():
        if size is not None:
            yield Holding(who=who, bytes=size, gpu=memory.gpu, lines=(mark.line,))


def phase_of(stack: tuple[PythonFrame, ...]) -> Phase:
    """The phase in which the stack's frames are; the program's own file name is ignored."""
    program = {frame.path for frame in stack if frame.function == "<module>"}
    frames, of_models = [], []
    for frame in stack:
        path = frame.path.replace("\\", "/")
        name = "" if frame.path in program else path.rpartition("/")[2]
        folder = next((part for part in _PARTS if part in path), "")
        frames.append(f"{folder} {name} {frame.function} {frame.code}".lower())
        # All models use torch's layers: a forward in one does not tell the part of a model.
        if "/torch/" not in path:
            of_models.append(frames[-1])
    for phase, text in _PHASES:
        searched = of_models if phase == "text" else frames
        if any(word in frame for frame in searched for word in text):
            return phase
    return "unknown"


def program_of(stack: tuple[PythonFrame, ...], subject: FactCollector) -> str:
    """The program that ran out of memory, by its name in the table of less memory."""
    paths = [frame.path.replace("\\", "/") for frame in stack]
    for folder, name in _FOLDERS.items():
        if any(folder in path for path in paths):
            return name
    if subject.quantises:
        return "lmdeploy-lite"
    # TurboMind computes without torch, so torch's allocations belong to LMDeploy's front end.
    return "lmdeploy" if subject.of_lmdeploy else "other"
