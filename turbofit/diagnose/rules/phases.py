"""Which part of a run a Python stack is of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from turbofit.diagnose.answer import PhaseName
    from turbofit.observe.log_events import PythonFrame

__all__ = ["phase_of", "program_of", "whole_matrix"]

#: Words in a frame's file name, function or source, in the order in which a phase is looked for:
#: nothing is computed while loading, and a vision tower calls nothing of the language model. vLLM
#: makes its cache inside the function that also profiles, and profiles with images too.
_PHASES: Final[tuple[tuple[PhaseName, tuple[str, ...]], ...]] = (
    # LMDeploy's PyTorch engine makes its cache and warms up inside its own from_pretrained.
    ("cache", ("cache_engine", "build_cache", "allocate_kv_cache")),
    ("warm-up", ("agent.py warmup", "agent.py _warmup")),
    ("weights", ("from_pretrained", "load_state_dict", "load_pretrained", "load_checkpoint",
                 "load_model", "set_module_tensor", "model_loader", "load_file", "process_weight",
                 "module.py convert", "module.py _apply", "load_weight", "initialize_model",
                 "init_vllm_registered_model", "load_vl_model", "build_model")),
    ("warm-up", ("warmup", "warm_up", "graph_runner", "cudagraph", "profile_run", "_dummy_run",
                 "determine_num_available_blocks", "determine_available_memory", "capture_model")),
    ("vision", ("vision", "intern_vit", "visual", "clip_", "_clip", "clip.py", "siglip", "eva_clip",
                "moonvit", "patch_embed", "image_encoder", "encode_images", "extract_feature",
                "get_image_features", "_process_image_input", "lmdeploy/vl/",
                # Qwen's towers pack the patches of all images into one sequence without a batch.
                "cu_seqlens", "= blk(", "k.transpose(1, 2)", "attention(q, k, v", "attention(q_i")),
    ("text", ("modeling_", "lm_head", "generate", "forward", "mlp", "self_attn")),
)  # fmt: skip
#: Calls that hold the whole matrix of attention, torch's own as well where it has no fused kernel.
_EAGER: Final = ("matmul", "softmax", "bmm", "baddbmm", "scaled_dot_product_attention")
_FOLDERS: Final = {
    "lmdeploy/pytorch/": "lmdeploy-pytorch", "lmdeploy/": "lmdeploy", "vllm/": "vllm",
    "sglang/": "sglang",
}  # fmt: skip
_SEPARATORS: Final = re.compile(r"[/\\]")
#: Its layers are everybody's: a forward of theirs says of no model which part it is.
_TORCH: Final = re.compile(r"[/\\]torch[/\\]")


def phase_of(stack: tuple[PythonFrame, ...]) -> PhaseName:
    """The phase; the name of the program itself says nothing."""
    program = {frame.path for frame in stack if frame.function == "<module>"}
    frames, of_models = [], []
    for frame in stack:
        name = "" if frame.path in program else _SEPARATORS.split(frame.path)[-1]
        folder = "lmdeploy/vl/" if "lmdeploy/vl/" in frame.path else ""
        frames.append(f"{folder} {name} {frame.function} {frame.code}".lower())
        if not _TORCH.search(frame.path):
            of_models.append(frames[-1])
    for phase, text in _PHASES:
        told = of_models if phase == "text" else frames
        if any(word in frame for frame in told for word in text):
            return phase
    return "unknown"


def program_of(stack: tuple[PythonFrame, ...], programs: set[str]) -> str | None:
    """The program that ran out: of its stack, else the only one that the log speaks of."""
    paths = [frame.path.replace("\\", "/") for frame in stack]
    for folder, name in _FOLDERS.items():
        if any(folder in path for path in paths):
            return name
    # TurboMind computes without torch: what torch allocates beside it is its front end's.
    named = programs - {"lmdeploy"}
    return next(iter(named)) if len(programs) == len(named) == 1 else None


def whole_matrix(stack: tuple[PythonFrame, ...]) -> bool:
    """Whether the stack ends in attention that holds its whole matrix."""
    return bool(stack) and any(call in stack[-1].code for call in _EAGER)
