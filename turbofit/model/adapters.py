"""Reads LoRA adapters that LMDeploy's PyTorch engine serves beside one base.

The engine's own loader checks little. This module refuses an adapter that the engine would misread
or leave partly unfilled, or at which the engine would end. Only headers of files are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Adapter, Model, TextDims
from turbofit.core.version import REFERENCE
from turbofit.model.checkpoint import read_section
from turbofit.model.config import Section
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.files import located
from turbofit.model.merge.merge import (
    ADAPTER_CONFIG,
    MERGE_BEFORE,
    NOT_PLAIN,
    UNTIE,
    beyond_lora,
    changes_of,
)
from turbofit.model.presets import find_preset
from turbofit.model.safetensors import Tensor as Stored
from turbofit.model.tensors import Tensor, text_tensors

#: The name of an adapter for which only a path is given. Source:
#: lmdeploy cli/utils.py::get_lora_adapters #b9fd9c
_UNNAMED: Final = "default"
#: The name of the decoder's layers in LMDeploy's class of a model. A class that is missing here was
#: not read, or joins q_proj, k_proj and v_proj without the table packed_modules_mapping, by which
#: adapters find these modules. Source: lmdeploy pytorch/adapter/adapter.py::find_all_target #2fcac1
_LAYERS: Final = {
    **dict.fromkeys(
        ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
         "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        "model.layers",
    ),
    "Qwen3VLForConditionalGeneration": "language_model.layers",
    **dict.fromkeys(
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        "model.language_model.layers",
    ),
}  # fmt: skip
#: LMDeploy's classes that join modules without that table: their adapters are stacked. Names of
#: layers are those of the decoder inside, of which InternLM2 loads the weights itself. Source:
#: lmdeploy pytorch/models/internvl.py::InternVLChatModel.load_lora_weights #cd4065
#: lmdeploy models/internvl3_hf.py::InternVLForConditionalGeneration.load_lora_weights #cd4065
#: lmdeploy pytorch/models/llava.py::LlavaForConditionalGeneration.__init__ #6953d1
_WITHOUT_TABLE: Final = frozenset({
    "InternVLChatModel", "InternVLForConditionalGeneration", "InternS1ForConditionalGeneration",
    "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
})  # fmt: skip
_LAYERS_INSIDE: Final = {
    "InternLM2ForCausalLM": "model.layers",
    **dict.fromkeys(
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
         "Qwen3MoeForCausalLM"),
        "language_model.model.layers",
    ),
}  # fmt: skip
#: Names of the decoder's layers of a vision-language model in releases of Transformers, which
#: renamed the layers in 4.52.
_CALLED: Final = frozenset({
    "model.layers", "language_model.model.layers", "model.language_model.layers",
    "language_model.layers",
})  # fmt: skip
_ATTENTION: Final = ("q_proj", "k_proj", "v_proj")
#: Modules of a tower whose names end like names of the decoder's modules. CLIP's tower and that of
#: InternVL's Transformers format join queries, keys and values, too. Source:
#: lmdeploy pytorch/models/llava.py::CLIPAttention.__init__ #09c345
#: lmdeploy pytorch/models/internvl3_hf.py::InternVLVisionAttention.__init__ #1e204c
_IN_TOWER: Final = {
    "Qwen2_5_VLForConditionalGeneration": frozenset({"gate_proj", "up_proj", "down_proj"}),
    **dict.fromkeys(_WITHOUT_TABLE - {"InternVLChatModel"}, frozenset(_ATTENTION)),
}
#: Settings of peft's config that LMDeploy does not read.
_UNREAD: Final = ("modules_to_save", "use_rslora", *NOT_PLAIN)
#: Names of the modules that adapters change, by the roles of the modules' tensors.
_MODULES: Final = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "mlp.gate": "gate_proj", "mlp.up": "up_proj", "mlp.down": "down_proj",
    "delta.qkv": "in_proj_qkv", "delta.z": "in_proj_z", "delta.b": "in_proj_b",
    "delta.a": "in_proj_a", "delta.o": "out_proj",
}  # fmt: skip
#: Modules as InternLM2's files call them, and the modules that each of them is.
_INTERNLM2: Final = {
    "wqkv": _ATTENTION, "wo": ("o_proj",),
    "w1": ("gate_proj",), "w3": ("up_proj",), "w2": ("down_proj",),
}  # fmt: skip
#: The part of the decoder's layer in which a module is, by the module's name in files.
PARENTS: Final = {
    **dict.fromkeys((*_ATTENTION, "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
    **dict.fromkeys(
        ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), "linear_attn"
    ),
    **dict.fromkeys(("wqkv", "wo"), "attention"),
    **dict.fromkeys(("w1", "w3", "w2"), "feed_forward"),
}
_Joined = Mapping[str, tuple[str, ...]]
#: Modules that LMDeploy joins, and their parts as files call them. A class without the table
#: packed_modules_mapping has adapters of the joined modules alone. Qwen3.5's table lacks the two
#: gates of a delta net: lmdeploy pytorch/models/qwen3_5.py::Qwen3_5GatedDeltaNet.__init__ #021893
_JOINED: Final[_Joined] = {"qkv_proj": _ATTENTION, "gate_up_proj": ("gate_proj", "up_proj")}
_JOINED_INTERNLM2: Final[_Joined] = {"gate_up_proj": ("w1", "w3")}
_JOINED_GATES: Final[_Joined] = {"in_proj_ba": ("in_proj_b", "in_proj_a")}
#: The key of one matrix in an adapter's file.
KEY: Final = re.compile(
    r"base_model\.model\.(?P<layers>.+)\.(?P<layer>\d{1,6})\.(?P<parent>\w+)\.(?P<module>\w+)"
    r"\.lora_(?P<part>[AB])\.weight"
)
#: The smallest block in which LMDeploy's kernel computes a rank, also for all smaller ranks; the
#: sizes of blocks are powers of two.
_LEAST_BLOCK: Final = 16  # lmdeploy kernels/cuda/fused_lora.py::fused_lora `max(16, max_rank)`
_LARGEST_RANK: Final = 1 << 14
#: Names of LMDeploy's chat templates: an adapter of such a name would get the template. Source:
#: lmdeploy lmdeploy/model.py `@MODELS.register_module(name=`
_TEMPLATES: Final = frozenset({
    "base", "cogvlm", "vicuna", "llava-v1", "llama2", "codellama", "chatglm", "mistral", "mixtral",
    "internvl-zh", "deepseek-vl", "deepseek-vl2", "deepseek-v4", "deepseek-v32", "deepseek-v3.2",
    "llava-chatml", "hf",
})  # fmt: skip
_SPEED: Final = "the forecast of speed is that of the base: the work of adapters is not counted"
_COUNTED: Final = (
    "the adapters' memory is counted, not rehearsed: pretend GPUs run no delta nets on the PyTorch"
    " engine"
)
#: The file with an adapter's matrices. LMDeploy would prefer adapter_model.bin.
FILE: Final = "adapter_model.safetensors"
_MERGE: Final = "turbofit merge BASE ADAPTER OUT makes a model of it"
#: Tensors of an adapter that replace both ends of a language model whose head is tied.
_TIED: Final = re.compile(r"\b(embed_tokens|lm_head)\.weight$")


def lora_modules(text: TextDims) -> dict[str, Tensor]:
    """Return the decoder's modules that adapters change, by the last part of each module's name."""
    return {_MODULES[one.role]: one for one in text_tensors(text) if one.role in _MODULES}


def layers_of(model: Model) -> str | None:
    """Return the name of the decoder's layers by which LMDeploy's class loads adapters, or None."""
    if model.architecture in _WITHOUT_TABLE:
        return _LAYERS_INSIDE.get(model.text.architecture)
    return _LAYERS.get(model.architecture)


def file_modules(model: Model) -> Mapping[str, tuple[str, ...]]:
    """Return the modules that a file may have, each with the modules of `lora_modules` that it is.

    A joined module has the matrices of several modules.
    """
    if model.text.architecture == "InternLM2ForCausalLM":
        return _INTERNLM2
    return {module: (module,) for module in lora_modules(model.text)}


def engine_modules(model: Model) -> Mapping[str, tuple[str, ...]]:
    """Return the modules that the engine finds, each with the modules of files that it is made of.

    Several of them, which LMDeploy joins and its table lacks, are stacked.
    """
    known, tables = file_modules(model), _JOINED_GATES
    if model.architecture in _WITHOUT_TABLE:
        tables = _JOINED_INTERNLM2 if known is _INTERNLM2 else _JOINED
    joined = {name: parts for name, parts in tables.items() if known.keys() >= {*parts}}
    alone = known.keys() - {part for parts in joined.values() for part in parts}
    return {**joined, **{module: (module,) for module in known if module in alone}}


def with_adapters(model: Model, words: Sequence[str], *, only_text: bool, typed: str = "") -> Model:
    """Return the model with the adapters that ``words`` name, each as NAME=PATH or PATH.

    ``only_text``: the engine loads no vision tower. ``typed``: what a person called the model.

    Raises:
        UsageError: with an adapter, LMDeploy would end, or would compute other values than peft.
    """
    if layers_of(model) is None:
        raise _refusal(
            f"`--adapters`: LMDeploy {REFERENCE} finds no modules for adapters in its class of"
            f" {model.name}, or turbofit has not read this class",
            MERGE_BEFORE if model.quantization else f"if it is plain LoRA, {_MERGE}",
        )
    split = [word.partition("=") if "=" in word else (_UNNAMED, "", word) for word in words]
    _check_names([name for name, _, _ in split], {typed, *_names_of(model)})
    adapters = [_adapter(model, name, path, only_text=only_text) for name, _, path in split]
    for module in lora_modules(model.text):
        ranks = {adapter.rank: adapter.name for adapter in adapters if module in adapter.modules}
        # The kernel computes all adapters of a module in blocks for the largest of their ranks.
        largest = max(ranks, default=0)
        if largest > _LEAST_BLOCK and largest & (largest - 1):
            raise _refusal(
                f"{ranks[largest]} has rank {largest}: above {_LEAST_BLOCK}, LMDeploy's kernel"
                " takes only ranks that are powers of two",
                MERGE_BEFORE if model.quantization else _MERGE,
            )
    own_names = {name.lower() for name in (model.name, _names_of(model)[-1])}
    of_another_base = (
        f"adapter {adapter.name} names {adapter.base[:100]} as its base, not {model.name}:"
        " the shapes fit, but only you can tell whether the weights do"
        for adapter in adapters
        if adapter.base and adapter.base.rstrip("/").rpartition("/")[2].lower() not in own_names
    )
    renamed = (_words_of_copy(model, adapter) for adapter in adapters if adapter.renamed)
    counted = () if model.text.delta is None else (_COUNTED,)
    warnings = dict.fromkeys((*model.warnings, _SPEED, *counted, *of_another_base, *renamed))
    return replace(model, adapters=tuple(adapters), warnings=tuple(warnings))


def used_modules(model: Model, adapter: Adapter) -> tuple[str, ...]:
    """Return the modules of an adapter as its file calls them."""
    known = file_modules(model)
    return tuple(name for name, parts in known.items() if {*parts} <= {*adapter.modules})


def _words_of_copy(model: Model, adapter: Adapter) -> str:
    """Say why engines open a copy of an adapter."""
    if stack_of(model, used_modules(model, adapter), adapter.rank) is not None:
        return (
            f"adapter {adapter.name} is served by a copy, of rank {adapter.rank}, in which the"
            " matrices of modules that LMDeploy joins are stacked; its values are the same"
        )
    return (
        f"adapter {adapter.name} names its modules in a way that LMDeploy does not read:"
        " turbofit starts engines with a copy of other names and the same values"
    )


def _names_of(model: Model) -> tuple[str, ...]:
    """Return the names of a model: its own, its preset's, its hub id, and the last part of it."""
    hub_id = model.hub_id or model.name
    return model.name, find_preset(hub_id) or model.name, hub_id, hub_id.rpartition("/")[2]


def _check_names(names: Sequence[str], of_model: Collection[str]) -> None:
    """Refuse empty and equal names, and names of the model or of LMDeploy's chat templates."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise _refusal(f"two adapters are called {twice}", "write each as NAME=PATH")
    reserved = {
        **dict.fromkeys(_TEMPLATES, "a chat template of LMDeploy, which the adapter would get"),
        **dict.fromkeys(of_model, "the model, and clients could ask only one of the two"),
    }
    for name in names:
        if not name:
            raise _refusal("an adapter has an empty name", "write it as NAME=PATH")
        if name in reserved:
            raise _refusal(
                f"an adapter is called {name}, like {reserved[name]}", "give it another name"
            )


def read_again(model: Model, planned: Adapter, *, only_text: bool) -> Adapter:
    """Read an adapter of a plan again, since its files may have changed after the plan was made.

    Raises:
        UsageError: the adapter has another rank, other modules or bytes than the plan counts, or is
            one that would be refused today.
    """
    adapter = _adapter(model, planned.name, planned.path, only_text=only_text)
    counted, found = _what_counts(planned), _what_counts(adapter)
    for before, now in zip(counted, found, strict=True):
        if before != now:
            raise _refusal(
                f"adapter {planned.name} has changed: the plan counts {before}, and now it has"
                f" {now}",
                "make a new plan, with the adapter as it is now",
            )
    return adapter


def _what_counts(adapter: Adapter) -> tuple[str, ...]:
    """Return in words what a plan counts of an adapter."""
    return (
        f"rank {adapter.rank}",
        f"modules {', '.join(adapter.modules)}",
        f"{adapter.file_bytes:,} bytes",
    )


def _adapter(model: Model, name: str, path: str, *, only_text: bool) -> Adapter:
    """Read and check one adapter in the folder or hub id ``path``."""
    folder = located(path.strip(), ADAPTER_CONFIG)
    files = FolderFiles(folder)
    config = read_section(files, ADAPTER_CONFIG, f"{name}'s {ADAPTER_CONFIG}")
    if config is None:
        raise _refusal(f"{folder} has no {ADAPTER_CONFIG}", "name the folder of an adapter")
    if files.size("adapter_model.bin") is not None:
        raise _refusal(
            f"adapter {name}: adapter_model.bin cannot be checked without running it",
            "save it as adapter_model.safetensors, and remove the .bin, which LMDeploy prefers",
        )
    stored = files.header(FILE)
    merging = _merging(model, config, stored)
    _check_config(name, config, merging)
    matches = [KEY.fullmatch(key) for key in stored]
    modules = _readable_targets(config) or {match["module"] for match in matches if match}
    of_tower = _IN_TOWER.get(model.architecture, frozenset[str]()).intersection(modules)
    if of_tower and not only_text:
        raise _refusal(
            f"adapter {name}: LMDeploy {REFERENCE} would also change the vision tower's"
            f" {min(of_tower)} by positions in the prompt, and misread pictures",
            f"if its base is {model.name}, {merging}; `--language-model-only` serves it without"
            " pictures",
        )
    rank = config.integer("r", high=_LARGEST_RANK)
    known = file_modules(model)
    used = tuple(module for module in known if module in modules)
    _check_keys(model, name, stored, dict(_expected_shapes(model, used, rank)), merging)
    layers_read = {match["layers"] for match in matches if match} == {layers_of(model)}
    stack = stack_of(model, used, rank)
    size = sum(tensor.bytes for tensor in stored.values())
    return Adapter(
        name=name,
        path=folder,
        rank=rank if stack is None else stack.rank,
        modules=tuple(part for module in used for part in known[module]),
        file_bytes=size if stack is None else _stacked_bytes(model, name, stack, stored, merging),
        base=config.string("base_model_name_or_path", ""),
        renamed=stack is not None or not (layers_read and _readable_targets(config)),
    )


def _merging(model: Model, config: Section, stored: Mapping[str, Stored]) -> str:
    """Say how an adapter that LMDeploy does not serve can become a part of its base."""
    if model.quantization is not None:
        return MERGE_BEFORE
    try:
        changes = changes_of(config, stored)
    except UsageError as exc:
        return exc.hint
    if model.text.tie_word_embeddings and any(_TIED.search(name) for name in changes.whole):
        return UNTIE
    return _MERGE


def _stacked_bytes(
    model: Model, name: str, stack: Stack, stored: Mapping[str, Stored], merging: str
) -> int:
    """Return the bytes of the stacked copy of a file; refuse a file of several types."""
    types = {tensor.dtype for tensor in stored.values()}
    if len(types) > 1:
        raise _refusal(
            f"adapter {name}: its matrices have several types, {', '.join(types)}", merging
        )
    size = sum(tensor.bytes for tensor in stored.values())
    return stack.elements(model) * size // sum(one.elements for one in stored.values())


class Stack(NamedTuple):
    """How an adapter's matrices are stacked for modules that LMDeploy joins.

    ``modules`` are the engine's modules, each with all of its parts as files call them. The file
    has matrices of rank ``file_rank``. ``rank`` is the rank of all stacked matrices: that of the
    most parts of one module together, as a power of two.
    """

    modules: Mapping[str, tuple[str, ...]]
    file_rank: int
    rank: int

    def shapes(self, model: Model, module: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of a stacked module's A and B, as files have them."""
        sizes = [sizes_of(model, part) for part in self.modules[module]]
        outputs = sum(outputs for outputs, _ in sizes)
        return (self.rank, sizes[0][1]), (outputs, self.rank)

    def elements(self, model: Model) -> int:
        """Return the number of elements of all stacked matrices."""
        total = 0
        for module, parts in self.modules.items():
            a, b = self.shapes(model, module)
            total += len(layers_with(model, parts[0])) * (prod(a) + prod(b))
        return total


def stack_of(model: Model, used: Sequence[str], rank: int) -> Stack | None:
    """Return how an adapter of the modules ``used`` in its file is stacked; None if it is not."""
    modules = {
        module: parts for module, parts in engine_modules(model).items() if {*parts} & {*used}
    }
    if all(len(parts) == 1 for parts in modules.values()):
        return None
    most = max(len({*parts} & {*used}) for parts in modules.values())
    return Stack(modules, rank, rank if most == 1 else 1 << (most * rank - 1).bit_length())


def sizes_of(model: Model, module: str) -> tuple[int, int]:
    """Return the outputs and inputs of a module of files."""
    tensors = lora_modules(model.text)
    shapes = [tensors[part].shape for part in file_modules(model)[module]]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def layers_with(model: Model, module: str) -> Sequence[int]:
    """Return the numbers of the layers with a module of files."""
    return lora_modules(model.text)[file_modules(model)[module][0]].layers or ()


def _check_config(name: str, config: Section, merging: str) -> None:
    """Refuse more than plain LoRA."""
    if problem := beyond_lora(config, _UNREAD):
        raise _refusal(
            f"adapter {name}: {problem}; LMDeploy {REFERENCE} serves plain LoRA alone", merging
        )
    if config.string("bias", "none") != "none":
        raise _refusal(f"adapter {name}: it has biases, and LMDeploy would end", merging)


def _readable_targets(config: Section) -> tuple[str, ...]:
    """Return ``target_modules``, if LMDeploy reads the list; else an empty tuple.

    LMDeploy reads the last parts of modules' names, but neither regular expressions nor paths.
    """
    if isinstance(config.values.get("target_modules"), str):
        return ()
    modules = config.strings("target_modules")
    return () if any("." in module for module in modules) else modules


def _expected_shapes(
    model: Model, used: Sequence[str], rank: int
) -> Iterator[tuple[tuple[str, int, str], tuple[int, ...]]]:
    """Yield the shape of each matrix of an adapter, by module, layer and letter (A or B)."""
    for module in used:
        outputs, inputs = sizes_of(model, module)
        for layer in layers_with(model, module):
            yield (module, layer, "A"), (rank, inputs)
            yield (module, layer, "B"), (outputs, rank)


def _check_keys(
    model: Model,
    name: str,
    stored: Mapping[str, Stored],
    wanted: dict[tuple[str, int, str], tuple[int, ...]],
    merging: str,
) -> None:
    """Refuse a file whose matrices are not exactly those in ``wanted``, by key and shape."""
    if not stored:
        raise _refusal(f"adapter {name}: its {FILE} has no matrices", "save the adapter again")
    layers = layers_of(model)
    called = {layers} if model.vision is None else _CALLED
    for key, tensor in stored.items():
        match = KEY.fullmatch(key)
        place = (match["module"], int(match["layer"]), match["part"]) if match else None
        if match is None or place not in wanted or match["parent"] != PARENTS[match["module"]]:
            raise _refusal(
                f"adapter {name}: LMDeploy would stop, since it has no place for the tensor"
                f" {key[:120]}",
                f"was it trained on another base than {model.name}? If not, {merging}",
            )
        if match["layers"] not in called:
            raise _refusal(
                f"adapter {name}: LMDeploy would stop, since the adapter calls the decoder's layers"
                f" {match['layers'][:60]}, and LMDeploy {REFERENCE} calls them {layers}",
                merging,
            )
        if tensor.shape != wanted.pop(place):
            raise _refusal(
                f"adapter {name}: {key[:120]} is {'x'.join(map(str, tensor.shape))}, of another"
                f" base than {model.name} or another rank", "name the base that it was trained on",
            )  # fmt: skip
    if wanted:
        module, layer, part = min(wanted)
        raise _refusal(
            f"adapter {name} has no lora_{part} of layer {layer}'s {module}, which LMDeploy would"
            " leave unfilled, and use",
            merging,
        )


def _refusal(problem: str, hint: str) -> UsageError:
    return UsageError(problem, hint=hint, options=["adapters"])
