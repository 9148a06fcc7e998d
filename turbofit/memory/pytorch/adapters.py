"""The memory of LoRA adapters on one rank of the PyTorch engine.

Each module that an adapter changes has two matrices in the model's type: A of LoRA ranks x inputs,
and B of LoRA ranks x outputs, with the summed ranks (LoRA's r) of all adapters. The engine's ranks
divide A if the layer is cut by rows, and B if the layer is cut by columns. Source:
lmdeploy pytorch/models/patch.py::add_adapters #9944c1
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from turbofit.core.model import Model
from turbofit.core.units import HALF, round_up
from turbofit.memory.pytorch.weights import kv_heads_held
from turbofit.model.adapters import engine_modules, file_modules, lora_modules
from turbofit.model.tensors import Tensor

#: Bytes of torch's smallest block (kMinBlockSize); each allocation takes whole blocks.
_LEAST_BLOCK: Final = 512


#: The largest LoRA rank with a kernel that fits into a block's shared memory, by compute
#: capability; other cards take ranks up to `_LEAST_RANK`. Source: the two shapes of `fused_lora`,
#: compiled by Triton 3.7.1; the smaller shape takes 73,728 bytes for rank 64, 122,880 for rank 128
#: and 221,184 for rank 256; on 7.5 it takes 640 bytes a rank.
_LARGEST_RANK: Final = {(8, 0): 128, (9, 0): 256, (10, 0): 256, (10, 3): 256}
_LEAST_RANK: Final = 64
#: The module of a delta net with queries, keys and values.
_DELTA_QKV: Final = "in_proj_qkv"


def adapter_bytes(model: Model, tp: int) -> int:
    """Return the bytes of all adapters' matrices on one rank.

    Each module also has the offsets of the adapters' LoRA ranks, which count as one block of
    torch's allocator. Each kind of module also has the LoRA ranks and the scalings, one block each.
    """
    total = 0
    for tensors, names in _engine_modules(model):
        ranks = sum(adapter.rank for adapter in model.loras if names & {*adapter.modules})
        if ranks:
            parts = [_sizes_on_rank(model, tensor, tp) for tensor in tensors]
            inputs, outputs = parts[0][0], sum(outputs for _, outputs in parts)
            sizes = (ranks * inputs * HALF, ranks * outputs * HALF, 1)
            each = sum(round_up(size, _LEAST_BLOCK) for size in sizes)
            total += each * tensors[0].count + 2 * _LEAST_BLOCK
    return total


def widest_output(model: Model, tp: int) -> int:
    """Return the most outputs that a module with adapters may have on one rank."""
    return max(
        sum(_sizes_on_rank(model, tensor, tp)[1] for tensor in tensors)
        for tensors, _ in _engine_modules(model)
    )


def _engine_modules(model: Model) -> Iterator[tuple[list[Tensor], set[str]]]:
    """Yield the tensors of each module that the engine finds, and the modules' own names."""
    known, of_files = lora_modules(model.text), file_modules(model)
    for parts in engine_modules(model).values():
        names = [name for part in parts for name in of_files[part]]
        yield [known[name] for name in names], {*names}


def _sizes_on_rank(model: Model, tensor: Tensor, tp: int) -> tuple[int, int]:
    """Return a module's inputs and outputs on one rank."""
    outputs, inputs = tensor.shape
    if tensor.split == "rows":
        return inputs // tp, outputs
    if tensor.split == "kv_heads":
        held = kv_heads_held(model.text.kv_heads, tp) // tp
        return inputs, held * outputs // model.text.kv_heads
    return inputs, outputs // tp


def adapter_files(model: Model) -> int:
    """Return the most bytes of the adapters' files that are on a card at one moment.

    A file is loaded whole while the previous file is still held. All files are freed at the end.
    """
    sizes = [adapter.file_bytes for adapter in model.loras]
    return max((sum(pair) for pair in pairwise(sizes)), default=sum(sizes))


def adapter_problem(model: Model, tp: int) -> str | None:
    """Return the reason why ``tp`` ranks cannot load the adapters, or None.

    LMDeploy cuts B into equal parts. If KV heads are repeated, these are too small for a rank. A
    rank gets others' rows of a delta net's queries, keys and values, which are one module, and of
    joined modules that are quantised: most of their classes do not part a joined B. Source:
    lmdeploy nn/linear/lora.py::LoRA.weight_loader_B #0a14e6
    lmdeploy pytorch/models/qwen3_5.py::Qwen3_5GatedDeltaNet._patch_qkv_weight_loader #81e311
    lmdeploy nn/linear/awq.py::MergedAwqLinear #680d0f
    """
    changed = {module for adapter in model.loras for module in adapter.modules}
    wrong = changed & {_DELTA_QKV, *_joined_quantised(model)}
    if tp > 1 and wrong:
        return (
            f"`--adapters`: LMDeploy would give {tp} ranks the wrong rows of an adapter's"
            f" {min(wrong)}"
        )
    of_keys = any(
        names & changed and names & {"k_proj", "v_proj"} for _, names in _engine_modules(model)
    )
    if of_keys and tp > model.text.kv_heads:
        return (
            f"`--adapters`: LMDeploy ends when {tp} ranks divide the {model.text.kv_heads} KV heads"
            " of an adapter"
        )
    return None


def _joined_quantised(model: Model) -> Iterator[str]:
    """Yield the modules that LMDeploy joins, if they are quantised."""
    for tensors, names in _engine_modules(model):
        if model.quantization is not None and len(tensors) > 1 and tensors[0].packs:
            yield from names


def kernel_problem(model: Model, capability: tuple[int, int], card: str) -> str | None:
    """Return a sentence about an adapter with a LoRA rank that has no kernel on a card, or None."""
    most = _LARGEST_RANK.get(capability, _LEAST_RANK)
    large = next((adapter for adapter in model.loras if adapter.rank > most), None)
    if large is None:
        return None
    return (
        f"adapter {large.name} has rank {large.rank}, and {card} has shared memory for LMDeploy's"
        f" kernel up to rank {most}"
    )
