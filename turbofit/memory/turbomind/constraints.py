"""What TurboMind asserts, aborts on or refuses, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.shared_terms import AMPERE, capability_of
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.pool import symmetric_buffer
from turbofit.memory.turbomind.weights import kv_heads_held, vision_mlp_width

__all__ = ["checkpoint_problem", "communicator_problem", "settings_problem", "tp_problem"]

_IPC_RANKS = 8
#: Tokens of a KV block come in multiples of this, and of the other on cards before Ampere. LMDeploy
#: says so in `--help` and does not hold it; with 16 answers are garbled (lmdeploy#1195).
_BLOCK = 32
_BLOCK_BEFORE_AMPERE = 64


def tp_problem(model: Model, tp: int) -> str | None:
    """Why LMDeploy's loaders would refuse this tensor-parallel degree; None where they do not.

    Source: LMDeploy builders/*.py, models/internvl.py, unified_attention_layer.cc.
    """
    return next(_tp_problems(model, tp), None)


def _tp_problems(model: Model, tp: int) -> Iterator[str]:
    text, vision = model.text, model.vision
    if text.heads % tp:
        yield f"{text.heads} attention heads do not divide by {tp}"
    if text.hidden % tp:
        yield f"hidden size {text.hidden} does not divide by {tp}"
    if text.delta is not None and text.delta.key_heads % tp:
        yield f"the delta nets' {text.delta.key_heads} key heads do not divide by {tp}"
    kv_heads = kv_heads_held(text.kv_heads, tp)
    if kv_heads % text.kv_heads or text.heads % kv_heads:
        yield f"{text.kv_heads} KV heads cannot be repeated over {tp} ranks"
    group = model.quantization.group_size if model.quantization else 1
    if text.heads * text.head_dim // group % tp:
        yield f"the output projection's groups of {group} do not divide by {tp}"
    if vision is None:
        return
    if vision_mlp_width(vision, tp) % tp:
        yield f"the vision tower's intermediate size {vision.intermediate} does not divide by {tp}"
    if vision.kind != "internvit" and vision.hidden * vision.merge**2 % tp:
        yield f"the vision merger's width does not divide by {tp}"


def communicator_problem(launch: EngineLaunch) -> str | None:
    """Why ``cuda-ipc`` (or ``native``) would abort: no peers, many ranks, a small buffer."""
    settings, gpus, vision = launch.settings, launch.gpus, launch.model.vision
    if settings.communicator == "nccl" or settings.tp == 1:
        return None
    name = settings.communicator
    if settings.tp > _IPC_RANKS:
        return f"--communicator {name} takes at most {_IPC_RANKS} GPUs"
    for k, a in enumerate(gpus):
        for b in gpus[:k]:
            if not launch.machine.link(a.index, b.index).peers:
                pair = f"GPUs {b.index} and {a.index}"
                return f"--communicator {name} needs peer access, which {pair} lack"
    if vision is not None and vision.kind != "internvit":
        needed = launch.vision_load.units_per_image * vision.hidden * 2
        size = symmetric_buffer(launch.model.text, settings)
        if needed > size:
            return f"--communicator {name}: an image needs {needed} bytes of a buffer of {size}"
    return None


def checkpoint_problem(launch: EngineLaunch) -> str | None:
    """A format that the checkpoint does not have, or blocks that the attention kernels do not read.

    Source: turbomind/converter.py: a format beside another one of the checkpoint's is an assertion;
    on 16-bit weights it finds none to read and changes the data type alone.
    """
    quantization, given = launch.model.quantization, launch.settings.model_format
    stored = quantization.method if quantization else "hf"
    if given not in (None, stored):
        stored_as = stored if quantization else f"{launch.model.dtype}, which is hf"
        return (
            f"--model-format {given}: the weights of {launch.model.name} are stored in {stored_as}"
        )
    ampere = all(capability_of(gpu) >= AMPERE for gpu in launch.gpus)
    multiple = _BLOCK if ampere else _BLOCK_BEFORE_AMPERE
    tokens = launch.settings.cache_block_seq_len
    if tokens % multiple:
        return (
            f"--cache-block-seq-len {tokens}: on these cards TurboMind needs a multiple of"
            f" {multiple}, which LMDeploy says and does not check"
        )
    return None


def settings_problem(settings: Settings, constants: EngineConstants) -> str | None:
    """Values that TurboMind refuses or aborts on."""
    if not 0 < settings.cache_max_entry_count < 1:
        return "--cache-max-entry-count must lie between 0 and 1: TurboMind takes no block count"
    if settings.quant_policy not in (0, 4, 8):
        return (
            f"--quant-policy {settings.quant_policy} does not run on TurboMind, whose caches are 0,"
            " 4 and 8: --engine pytorch takes it"
        )
    if settings.session_len < constants.warmup_lengths[0]:
        return (
            f"a session of {settings.session_len} tokens is shorter than TurboMind's shortest"
            f" warm-up, {constants.warmup_lengths[0]} tokens"
        )
    return None
