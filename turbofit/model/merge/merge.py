"""Merges an adapter into a checkpoint: decides on each tensor, and writes the result.

An adapter has peft's format: `adapter_config.json` has rank and scaling, and
`adapter_model.safetensors` or `.bin` has the matrices. LLaVA's own trainer writes other trained
tensors into `non_lora_trainables.bin`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.core.units import grouped
from turbofit.model.checkpoint import quantization_in, read_section
from turbofit.model.config import Section
from turbofit.model.folder import FolderFiles
from turbofit.model.merge import llava
from turbofit.model.merge.files import (
    Result,
    Tensors,
    check_target,
    copied_files,
    dtype_name,
    located,
    open_tensors,
    open_weights,
    piece,
    torch_library,
    weight_files,
    write,
)

#: The file that makes a folder an adapter.
ADAPTER_CONFIG: Final = "adapter_config.json"

_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDES: Final = ("non_lora_trainables.bin", "non_lora_state_dict.bin")
_LORA: Final = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(?P<kind>weight|bias))?"
)
_WRAPPED: Final = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!(?:weight|bias)$)[^.]+)?)\.")
#: Settings of peft with which the merged weight is not W + s·B·A.
NOT_PLAIN: Final = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices",
    "lora_bias", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip
#: Initialisations that also change the base, so that W must be the changed base's weight.
_RESIDUAL: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: The hint on an adapter that `merge` does not take.
PEFT_MERGES: Final = "merge it with peft's own merge_and_unload, if the base fits into RAM"
#: The hints on bases that `merge` does not take.
MERGE_BEFORE: Final = "merge into the 16-bit checkpoint it was made from, and quantise the result"
UNTIE: Final = "untie and save the base first, since lm_head would change with the embeddings"
#: Prefixes of names that differ between releases of peft, Transformers and LLaVA.
_PREFIXES: Final = ("base_model", "model", "language_model")


class Lora(NamedTuple):
    """The change of one module's weight: ``scaling · B @ A`` is added to the weight."""

    a: Any
    b: Any
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the changed weight: (out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def merged(self, weight: Any) -> Any:
        """Merge into ``weight``, in place, bit for bit as peft does, and return the weight.

        The order of operations and their dtypes are those of ``PeftModel.from_pretrained(base,
        adapter).merge_and_unload()`` in peft 0.21 on a CPU. There the adapter stays in float32: the
        delta is added in float32, and the sum is rounded once.
        """
        delta = self.b.float() @ self.a.float()
        delta *= self.scaling
        weight += delta
        return weight


class AdapterWeights(NamedTuple):
    """The changes of an adapter, by the names of the tensors.

    ``loras`` are added to weights; ``whole`` tensors replace tensors. ``base_name`` is the
    adapter's base.
    """

    loras: Mapping[str, Lora] = MappingProxyType({})
    whole: Mapping[str, Any] = MappingProxyType({})
    base_name: str = ""


def read_adapter(folder: str) -> AdapterWeights:
    """Read the adapter in a folder; an adapter other than W + s·B·A is refused.

    Raises:
        UsageError: the folder has no adapter, or an adapter of another kind.
    """
    files = FolderFiles(folder)
    config = read_section(files, ADAPTER_CONFIG)
    if config is None:
        raise UsageError(
            f"{folder} has no {ADAPTER_CONFIG}",
            hint="name the folder that peft's save_pretrained wrote",
        )
    weights = next((name for name in _WEIGHTS if files.size(name) is not None), None)
    if weights is None:
        raise UsageError(
            f"{folder} has neither {' nor '.join(_WEIGHTS)}", hint="finish the adapter's download"
        )
    changes = changes_of(config, open_tensors(folder, weights))
    besides: Tensors = {}
    for name in _BESIDES:
        if files.size(name) is not None:
            besides |= open_tensors(folder, name)
    return changes._replace(whole={**changes.whole, **besides})


def changes_of(config: Section, tensors: Mapping[str, Any]) -> AdapterWeights:
    """Return the changes of an adapter, whose tensors may be known by their shapes alone.

    Raises:
        UsageError: the adapter is another one than W + s·B·A.
    """
    if problem := beyond_lora(config):
        raise UsageError(f"{config.what}: {problem}", hint=PEFT_MERGES)
    parts: dict[str, Tensors] = {}
    whole: Tensors = {}
    for key, tensor in tensors.items():
        if match := _LORA.fullmatch(key):
            part = "bias" if match["kind"] == "bias" else match["part"]
            parts.setdefault(match["module"], {})[part] = tensor
        else:
            whole[_WRAPPED.sub(".", key)] = tensor
    loras = {f"{module}.weight": _lora(config, module, kinds) for module, kinds in parts.items()}
    return AdapterWeights(loras, whole, config.string("base_model_name_or_path", ""))


def beyond_lora(config: Section, settings: Iterable[str] = NOT_PLAIN) -> str | None:
    """Return why an adapter is more than plain LoRA on an unchanged base; None for plain LoRA.

    ``settings`` are keys of peft's config that plain LoRA does not set.
    """
    kind = config.string("peft_type", "LORA")
    if kind.upper() != "LORA":
        return f"{kind[:30]} is not LoRA"
    if key := next((key for key in settings if config.values.get(key)), None):
        return f"LoRA with {key} is more than plain LoRA"
    begun = config.values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_RESIDUAL):
        return (
            f"init_lora_weights is {begun[:30]!r}, which changed the base too: save the adapter"
            " with path_initial_model_for_weight_conversion, as peft's guide says"
        )
    return None


def _lora(config: Section, module: str, kinds: Tensors) -> Lora:
    """Return the LoRA of one module; refuse matrices that do not have the config's rank.

    ``kinds``: the module's matrices, by their letters A and B.
    """
    plain = module.removeprefix("base_model.model.")[:100]
    if kinds.keys() != {"A", "B"}:
        halves = kinds.keys() < {"A", "B"}
        what = "one half of a LoRA" if halves else "a bias of B, or LoRA on embeddings"
        raise UsageError(f"{plain} has {what}, which is not merged here", hint=PEFT_MERGES)
    a, b, rank = kinds["A"], kinds["B"], config.integer("r", 8)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        shapes = " and ".join("x".join(map(str, one.shape)) for one in (a, b))
        raise UsageError(
            f"{plain} has LoRA matrices of {shapes}; both need two dimensions and the config's"
            f" rank {rank}",
            hint=PEFT_MERGES,
        )
    alpha = config.values.get("lora_alpha", 8)
    if type(alpha) is not int:  # an integer is not made a float, as in peft
        alpha = config.number("lora_alpha", 8, low=-1e6, high=1e6)
    divisor = math.sqrt(rank) if config.boolean("use_rslora", False) else rank
    return Lora(a, b, alpha / divisor)


class Merged(Struct):
    """The result of a merge.

    ``bytes`` is the size of the weight files, ``tensors`` the number of tensors in them, ``loras``
    the number of modules with a LoRA, ``replaced`` the number of tensors that the adapter replaced.
    """

    out: str
    architecture: str
    converted: bool
    vision_tower: str | None
    dtype: str
    files: tuple[str, ...]
    bytes: int
    tensors: int
    loras: int
    replaced: int
    warnings: tuple[str, ...]


def merge(
    base: str,
    adapter: str | None,
    out: str,
    *,
    vision_tower: str | None = None,
) -> Merged:
    """Merge an adapter into a checkpoint, convert an original LLaVA, or both.

    Merged tensors equal peft's bit for bit (`Lora.merged`). One output file at a time is in RAM.

    Args:
        base: folder or hub id (in the local cache) of the checkpoint.
        adapter: folder or hub id of the adapter; None only converts.
        out: the folder to make.
        vision_tower: folder or hub id of the CLIP that an original LLaVA leaves out.

    Raises:
        UsageError: the merge is not possible; no output is left behind.
        PackageError: torch is missing.
    """
    folder = located(base, "config.json")
    lora_folder = located(adapter, ADAPTER_CONFIG) if adapter else None
    target = check_target(out, (folder, *([lora_folder] if lora_folder else [])))
    torch_library()
    config = read_section(FolderFiles(folder), "config.json")
    if config is None:
        raise UsageError(f"{folder} has no config.json", hint="name a checkpoint's folder")
    _refuse_base(config)
    lora = read_adapter(lora_folder) if lora_folder else AdapterWeights()
    warnings = _base_warnings(base, folder, config, lora)
    original = _original(base, config, lora_folder, vision_tower)
    files = open_weights(folder)
    stored = dict(chain.from_iterable(tensors.items() for tensors in files.values()))
    added, replaced, besides = _assigned(lora, stored, projector=original is not None)
    _refuse_tied(config, stored, replaced)
    edits = {name: (change.merged,) for name, change in added.items()}
    pieces = {
        file: {
            name: piece(replaced.get(name, tensor), tensor.dtype, *edits.get(name, ()))
            for name, tensor in tensors.items()
        }
        for file, tensors in files.items()
    }
    # The dtype of the largest tensor counts as that of the checkpoint.
    kind = max(stored.values(), key=lambda tensor: int(tensor.nbytes)).dtype
    if original is not None:
        result = llava.converted(original, folder, pieces, besides, vision_tower, kind)
        warnings += llava.template_warnings(target)
    else:
        result = Result(
            files=weight_files(tuple(pieces.values())),
            texts={},
            copies=copied_files(folder, ()),
            architecture=next(iter(config.strings("architectures")), "unknown"),
        )
    names = write(result, folder, target)
    return Merged(
        out=target,
        architecture=result.architecture,
        converted=original is not None,
        vision_tower=result.tower,
        dtype=dtype_name(kind),
        files=names,
        bytes=sum(os.path.getsize(os.path.join(target, name)) for name in result.files),
        tensors=sum(map(len, result.files.values())),
        loras=len(added),
        replaced=len(replaced),
        warnings=tuple(warnings),
    )


def _original(
    base: str, config: Section, lora_folder: str | None, vision_tower: str | None
) -> Section | None:
    """Return the config of an original LLaVA; None if the merge is of another model.

    If the adapter is an original LLaVA's and the base is an original LLaVA or a plain Llama, the
    adapter's config is returned; else the base's.
    """
    names = config.strings("architectures")
    original = config if llava.ORIGINAL in names else None
    if lora_folder:
        files = FolderFiles(lora_folder)
        adapter = read_section(files, "config.json", "the adapter's config.json")
        if adapter and llava.ORIGINAL in adapter.strings("architectures"):
            original = adapter if original or "LlamaForCausalLM" in names else None
    if original:
        llava.check_original(original)
    elif not lora_folder:
        raise UsageError(
            f"nothing to do: {base} is no original LLaVA, and no adapter was named",
            hint="turbofit merge BASE ADAPTER OUT",
        )
    elif vision_tower:
        raise UsageError(
            "--vision-tower is only for an original LLaVA", hint="leave --vision-tower out"
        )
    return original


def _refuse_base(config: Section) -> None:
    """Refuse a base that is quantised."""
    if quantization_in(config.values):
        raise UsageError(
            "the base is quantised: a LoRA cannot be merged into it bit for bit",
            hint=MERGE_BEFORE,
        )


def _base_warnings(base: str, folder: str, config: Section, lora: AdapterWeights) -> list[str]:
    """Warn if the adapter's config names another base than the given one."""
    # The path of a hub's snapshot ends in models--ORG--NAME/snapshots/COMMIT.
    names = re.split("/|--", "/".join((base, folder, config.string("_name_or_path", ""))).lower())
    if re.split("/|--", lora.base_name.lower().rstrip("/"))[-1] in ("", *names):
        return []
    return [
        f"the adapter names {lora.base_name[:100]} as its base, not {base}: the shapes fit, but"
        " only you can tell whether the weights do"
    ]


def _refuse_tied(config: Section, stored: Iterable[str], replaced: Iterable[str]) -> None:
    """Refuse new embeddings for a base whose ``lm_head`` is tied to its embeddings."""
    text = config.section("text_config") or config.section("llm_config") or config
    head = any(name.endswith("lm_head.weight") for name in stored)
    if head or not text.boolean("tie_word_embeddings", False):
        return
    if any(name.endswith("embed_tokens.weight") for name in replaced):
        raise UsageError(
            "the adapter replaces the embeddings of a base that ties lm_head to them",
            hint=UNTIE,
        )


def _common_name(name: str) -> str:
    """Return a tensor's name for comparison: without the parts that differ between releases.

    Since Transformers 4.52, a checkpoint's ``language_model.model.layers`` are called
    ``model.language_model.layers`` in modules, and so in adapters. Transformers 5 dropped
    ``vision_model`` from CLIP's tower. The original LLaVA has another name for the projector.
    """
    parts = name.split(".")
    while parts[0] in _PREFIXES and len(parts) > 1:
        parts.pop(0)
    if parts[:2] == ["vision_tower", "vision_model"] and len(parts) > 2:
        parts.pop(1)
    if parts[0] == "mm_projector" and len(parts) > 1 and parts[1] in llava.PROJECTOR:
        parts[:2] = ["multi_modal_projector", llava.PROJECTOR[parts[1]]]
    return ".".join(parts)


def _assigned(
    adapter: AdapterWeights, stored: Tensors, *, projector: bool
) -> tuple[dict[str, Lora], Tensors, Tensors]:
    """Assign the adapter's changes to tensors of the base; refuse a change without a tensor.

    Return three mappings: the LoRAs to add and the tensors to replace, both by names in the base,
    and the tensors of a projector that the base lacks, by names in the original LLaVA. The adapter
    may have such a projector only if ``projector``.
    """
    by_common_name = grouped((_common_name(name), name) for name in stored)
    added: dict[str, Lora] = {}
    replaced: Tensors = {}
    besides: Tensors = {}
    unplaced: list[str] = []
    base_hint = f"name the base that the adapter was trained on: {adapter.base_name[:100]}"
    base_hint = base_hint.rstrip(": ")
    for key, change in (*adapter.loras.items(), *adapter.whole.items()):
        is_lora = isinstance(change, Lora)
        plain = key.removeprefix("base_model.").removeprefix("model.")
        exact = [name for name in (key, plain, f"model.{plain}") if name in stored]
        # The exact name wins; else a name may differ in the parts that releases name differently.
        names = exact[:1] or by_common_name.get(_common_name(key), [])
        if len(names) != 1:
            if projector and not is_lora and ".mm_projector." in key:
                besides["model.mm_projector." + key.rpartition(".mm_projector.")[2]] = change
            else:
                unplaced.append(key)
            continue
        name, shapes = names[0], (change.shape, stored[names[0]].shape)
        if shapes[0] != shapes[1]:
            new, old = (" × ".join(map(str, shape)) or "one number" for shape in shapes)
            raise UsageError(
                f"the adapter {'changes' if is_lora else 'replaces'} {name[:100]}, which is {old}"
                f" in the base, by {new}",
                hint=f"{base_hint}; if tokens were added, resize and save the base first",
            )
        if is_lora:
            added[name] = change
        else:
            replaced[name] = change
    if unplaced:
        tied = any("lm_head" in key for key in unplaced)
        raise UsageError(
            f"the base has no tensor for {', '.join(unplaced)[:400]} of the adapter",
            hint="the base ties lm_head to the embeddings: untie and save it first"
            if tied
            else base_hint,
        )
    return added, replaced, besides
