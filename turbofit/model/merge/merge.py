"""One merge: read the folders, decide, write."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct
from turbofit.model.config import Section, parse_json
from turbofit.model.folder import FolderFiles
from turbofit.model.hub_cache import cached_snapshot
from turbofit.model.merge import llava
from turbofit.model.merge.adapter import ADAPTER_CONFIG, Adapter, read_adapter
from turbofit.model.merge.output import check_target
from turbofit.model.merge.result import converted, main_dtype, plain, write
from turbofit.model.merge.shards import open_shards
from turbofit.model.merge.tensor_steps import MergePlan, plan_pieces
from turbofit.model.merge.tensors import DTYPES, FLOATS, torch_library
from turbofit.model.names import read_name
from turbofit.model.presets import HUB_ID, find_preset, load_preset

__all__ = ["Merged", "merge"]

_DTYPES: Final = {DTYPES[key]: key for key in FLOATS}

Say = Callable[[str], None]


class Merged(Struct):
    """What was written. Counts are of tensors, ``loras`` of modules; sizes are bytes."""

    out: str
    base: str
    adapter: str | None
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


def merge(  # noqa: PLR0913 - the public entry: its keywords are what can be asked
    base: str,
    adapter: str | None,
    out: str,
    *,
    vision_tower: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    say: Say = lambda _: None,
) -> Merged:
    """Merge an adapter into a checkpoint, convert an original LLaVA, or both.

    Each tensor of the result has the bits that peft's ``merge_and_unload`` gives on this machine's
    CPU (`edits`). In RAM are one tensor and its change at a time.

    Args:
        base: folder or hub id (in the local cache) of the checkpoint.
        adapter: folder or hub id of the adapter; None only converts.
        out: the folder to make.
        vision_tower: folder or hub id of the CLIP that an original LLaVA leaves out.
        dtype: ``float16``, ``bfloat16`` or ``float32``; None keeps the base's.
        force: replace ``out`` where it is not empty.
        say: hears of progress, a line at a time.

    Raises:
        UsageError: see the readers; nothing is left behind.
        PackageError: torch is missing.
    """
    folder = _located(base, "config.json", say)
    lora_folder = _located(adapter, ADAPTER_CONFIG, say) if adapter else None
    target = check_target(out, (folder, *([lora_folder] if lora_folder else [])), force=force)
    torch_library()
    config = _config(folder)
    _refuse_quantised(config)
    lora = read_adapter(lora_folder) if lora_folder else None
    original = _original(config, lora_folder)
    if original is None:
        _refuse_useless(base, adapter, vision_tower)
    warnings = _warnings(base, folder, config, lora, original is not None, target)
    shards = open_shards(folder)
    planned = plan_pieces(shards, lora, dtype and _DTYPES[dtype], projector=original is not None)
    if lora:
        _refuse_tied(config, planned, warnings)
    kind = _DTYPES[dtype] if dtype else main_dtype(planned)
    if original is not None:
        result = converted(original, folder, shards, planned, vision_tower, kind, DTYPES[kind])
    else:
        result = plain(config, folder, shards, planned, dtype)
    files = write(result, folder, target, say)
    return Merged(
        out=target,
        base=folder,
        adapter=lora_folder,
        architecture=result.architecture,
        converted=original is not None,
        vision_tower=result.tower,
        dtype=DTYPES[kind],
        files=files,
        bytes=result.bytes,
        tensors=sum(map(len, result.files.values())),
        loras=planned.loras,
        replaced=len(planned.replaced),
        warnings=tuple(warnings),
    )


def _refuse_useless(base: str, adapter: str | None, vision_tower: str | None) -> None:
    """Refuse what only an original LLaVA has a use for."""
    if not adapter:
        raise UsageError(
            f"nothing to do: {base} is no original LLaVA, and no adapter was named",
            hint="turbofit merge BASE ADAPTER OUT",
        )
    if vision_tower:
        raise UsageError(
            "--vision-tower is for an original LLaVA, which this is not", hint="leave it out"
        )


def _located(name: str, needed: str, say: Say) -> str:
    """A folder, or a snapshot in the local hub cache."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return os.path.abspath(path)
    hub_id, revision, notes = read_name(name)
    if preset := find_preset(hub_id):
        hub_id = load_preset(preset).hub_id
    for note in notes:
        say(note)
    if cached := cached_snapshot(hub_id, revision):
        return cached
    raise UsageError(
        f"{name[:200]} is neither a folder nor in the local hub cache",
        hint=f"hf download {hub_id}{f' --revision {revision}' if revision else ''}"
        if HUB_ID.fullmatch(hub_id)
        else f"name a folder that holds {needed}",
    )


def _config(folder: str) -> Section:
    data = FolderFiles(folder).read("config.json")
    if data is None:
        raise UsageError(f"{folder} has no config.json", hint="name a checkpoint's folder")
    return parse_json(data, "config.json")


def _original(config: Section, adapter: str | None) -> Section | None:
    """The config of an original LLaVA: the base's, or the adapter's over a plain language model."""
    names = config.strings("architectures")
    data = FolderFiles(adapter).read("config.json") if adapter else None
    adapter_config = parse_json(data, "the adapter's config.json") if data else None
    if adapter_config and llava.ORIGINAL in adapter_config.strings("architectures"):
        if not {llava.ORIGINAL, "LlamaForCausalLM"} & set(names):
            return None
        found = adapter_config
    elif llava.ORIGINAL in names:
        found = config
    else:
        return None
    llava.check_original(found)
    return found


def _refuse_quantised(config: Section) -> None:
    parts = [config.values, *(one for one in config.values.values() if isinstance(one, dict))]
    for part in parts:
        found = part.get("quantization_config")
        if isinstance(found, dict) and found:
            method = str(found.get("quant_method", "quantised"))[:30]
            raise UsageError(
                f"the base is quantised ({method}): a LoRA cannot be merged into it bit for bit",
                hint="merge into the 16-bit checkpoint it was made from, and quantise the result",
            )


def _refuse_tied(config: Section, planned: MergePlan, warnings: list[str]) -> None:
    """Where lm_head is the embeddings, a change of one is a change of both."""
    text = config.section("text_config") or config.section("llm_config") or config
    pieces = [piece for pieces in planned.files for piece in pieces]
    has_head = any(piece.name.endswith("lm_head.weight") for piece in pieces)
    if has_head or not text.boolean("tie_word_embeddings", False):
        return
    for piece in pieces:
        if not piece.name.endswith("embed_tokens.weight"):
            continue
        if piece.name in planned.replaced and not piece.edits:
            raise UsageError(
                "the adapter replaces the embeddings of a base that ties lm_head to them",
                hint="untie and save the base first: lm_head would change with them",
            )
        if piece.edits:
            warnings.append(
                "the base ties lm_head to the embeddings: the LoRA of these changes both, as in"
                " peft's merge"
            )


def _warnings(
    base: str, folder: str, config: Section, lora: Adapter | None, converts: bool, target: str
) -> list[str]:
    found = []
    if lora and lora.base_name:
        said = {base, folder, config.string("_name_or_path", "")}
        # A hub snapshot's folder is a commit; the hub id stands two levels up.
        said |= {one.replace("--", "/") for one in folder.split(os.sep)}
        if _last(lora.base_name) not in {_last(one) for one in said}:
            found.append(
                f"the adapter names {lora.base_name[:100]} as its base, not {base}: shapes fit,"
                " whether the weights do only you can tell"
            )
    if converts and (problem := llava.template(target)):
        found.append(problem)
    return found


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
