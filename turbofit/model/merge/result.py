"""What a merge writes: the base's layout with other weights, or LLaVA's hf format."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.model.config import Section
from turbofit.model.folder import INDEX, FolderFiles
from turbofit.model.merge import llava
from turbofit.model.merge.edits import GrowRows
from turbofit.model.merge.llava_files import hf_config, other_files, vision_config
from turbofit.model.merge.llava_tokens import TOKENIZER_FILES, Tokens, add_tokens
from turbofit.model.merge.output import copy_file, staged, write_text
from turbofit.model.merge.shards import Shard, ShardPiece, header_of, index_of, write_shard
from turbofit.model.merge.tensor_steps import MergePlan
from turbofit.model.merge.tensors import FLOATS, StoredTensor

__all__ = ["Result", "converted", "main_dtype", "plain", "write"]

_WEIGHTS: Final = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json",
)  # fmt: skip
_SLACK: Final = 1 << 20
_GROWING: Final = ("embed_tokens.weight", "lm_head.weight")


class Result(NamedTuple):
    """What is to be written: weight files, small files as text, and files to copy."""

    files: dict[str, list[ShardPiece]]
    texts: dict[str, str]
    copies: tuple[str, ...]
    architecture: str
    tower: str | None

    @property
    def bytes(self) -> int:
        """The weight files together."""
        return sum(map(_size, self.files.values()))


def main_dtype(planned: MergePlan) -> str:
    """The dtype of most bytes (safetensors' name)."""
    sizes: Counter[str] = Counter()
    for pieces in planned.files:
        for piece in pieces:
            if piece.stored.dtype in FLOATS:
                sizes[piece.stored.dtype] += piece.stored.bytes
    return sizes.most_common(1)[0][0] if sizes else "F16"


def plain(
    config: Section, folder: str, shards: Sequence[Shard], planned: MergePlan, dtype: str | None
) -> Result:
    """The base's layout and files, with other weights.

    ``dtype`` is torch's name, None where every tensor keeps its own.
    """
    names = _file_names([shard.file for shard in shards], 0)
    texts = {}
    if dtype:
        texts["config.json"] = _json(_with_dtype(config.values, dtype))
    architecture = next(iter(config.strings("architectures")), "unknown")
    copies = tuple(name for name in _copied(folder) if name not in texts)
    return Result(dict(zip(names, planned.files, strict=True)), texts, copies, architecture, None)


def converted(  # noqa: PLR0913 - what a conversion did
    original: Section, folder: str, shards: Sequence[Shard], planned: MergePlan, given: str | None,
    kind: str, dtype: str,
) -> Result:  # fmt: skip
    """The hf format: other names, two more tokens, and the vision tower in it.

    Args:
        original: config.json of the original format.
        folder: the base, whose tokenizer is taken.
        shards: the base's weight files.
        planned: what becomes of their tensors.
        given: ``--vision-tower``.
        kind: dtype of the result (safetensors' name).
        dtype: the same, torch's name.

    Raises:
        UsageError: a part is missing, or has no place in the hf format.
    """
    tokens = add_tokens(folder)
    files = [_renamed(pieces, tokens) for pieces in planned.files]
    besides = []
    for name, one in planned.besides.items():
        stored = StoredTensor(kind, one.store.entries[one.key].shape)
        besides.append(ShardPiece(llava.hf_name(name) or name, stored, one.store, one.key))
    tower_pieces = [
        piece for pieces in files for piece in pieces if piece.name.startswith("vision_tower.")
    ]
    tower = None
    if not tower_pieces:
        tower = llava.read_tower(original.string("mm_vision_tower", ""), given, kind)
        tower_pieces = list(tower.pieces)
        besides += tower_pieces
    if besides:
        files.append(besides)
    sizes = {piece.name: piece.stored for pieces in files for piece in pieces}
    _check_complete(set(sizes), original)
    vision = vision_config(
        {
            piece.name.removeprefix("vision_tower.vision_model."): piece.stored
            for piece in tower_pieces
        },
        tower.config if tower else None,
    )
    _check_tower(vision, sizes, original)
    rows = sizes["language_model.lm_head.weight"].shape[0]
    texts = {
        **other_files(original, vision, tokens, FolderFiles(folder)),
        "config.json": _json(hf_config(original, vision, tokens, rows, dtype)),
    }
    names = _file_names([shard.file for shard in shards], len(files) - len(shards))
    skipped = {*texts, *TOKENIZER_FILES, "preprocessor_config.json", "chat_template.json"}
    copies = tuple(
        name for name in _copied(folder) if name not in skipped and not name.endswith(".py")
    )
    weights = dict(zip(names, files, strict=True))
    where = tower.where if tower else None
    return Result(weights, texts, copies, "LlavaForConditionalGeneration", where)


def write(result: Result, folder: str, target: str, say: Callable[[str], None]) -> tuple[str, ...]:
    """Write everything into a folder beside the target, then put that in its place.

    Returns:
        The names of the files.

    Raises:
        UsageError: no room, or the folder cannot be written; nothing is left behind then.
    """
    source = FolderFiles(folder)
    small = sum(source.size(name) or 0 for name in result.copies) + _SLACK
    texts = dict(result.texts)
    if len(result.files) > 1 or source.size(INDEX) is not None:
        texts[INDEX] = index_of(result.files)
    tensors = (piece for pieces in result.files.values() for piece in pieces)
    total, written = sum(piece.stored.bytes for piece in tensors), 0

    def done(size: int) -> None:
        nonlocal written
        written += size
        tell(Step("writing", written, total, "bytes"))

    with staged(target, result.bytes + small) as temporary:
        for name in result.copies:
            copy_file(os.path.join(folder, name), os.path.join(temporary, name))
        for name, text in texts.items():
            write_text(os.path.join(temporary, name), text)
        for number, (name, pieces) in enumerate(result.files.items(), 1):
            changed = sum(bool(piece.edits) for piece in pieces)
            say(
                f"writing {name} ({number} of {len(result.files)}): {format_bytes(_size(pieces))},"
                f" {len(pieces)} tensors, {changed} changed"
            )
            write_shard(os.path.join(temporary, name), pieces, done)
    return tuple(sorted({*result.files, *texts, *result.copies}))


def _size(pieces: Sequence[ShardPiece]) -> int:
    """Bytes of a weight file."""
    return len(header_of(pieces)[1]) + sum(piece.stored.bytes for piece in pieces)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _renamed(pieces: Sequence[ShardPiece], tokens: Tokens) -> list[ShardPiece]:
    """Pieces under their hf names, the embeddings with rows for the added tokens."""
    found = []
    for piece in pieces:
        name = llava.hf_name(piece.name)
        if name is None:
            continue
        if name.endswith(_GROWING):
            rows = llava.grown_rows(tokens, piece.stored.shape[0])
            stored = StoredTensor(piece.stored.dtype, (rows, *piece.stored.shape[1:]))
            found.append(
                ShardPiece(name, stored, piece.store, piece.key, (*piece.edits, GrowRows(rows)))
            )
        else:
            found.append(piece._replace(name=name))
    return found


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in values.items()
    }
    for key in ("torch_dtype", "dtype"):
        if isinstance(changed.get(key), str):
            changed[key] = dtype
    return changed


def _check_complete(names: set[str], original: Section) -> None:
    """The parts without which nothing loads."""
    layers = original.integer("num_hidden_layers")
    needed = {
        f"multi_modal_projector.linear_{i}.{part}" for i in "12" for part in ("weight", "bias")
    }
    needed |= {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    needed |= {f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in range(layers)}
    if missing := sorted(needed - names):
        raise UsageError(
            f"the result would lack {', '.join(missing[:2])}",
            hint="name the adapter too, where the projector is in its non_lora_trainables.bin"
            if "projector" in missing[0] or "projector" in missing[-1]
            else "finish the checkpoint's download",
        )


def _check_tower(
    vision: dict[str, Any], sizes: Mapping[str, StoredTensor], original: Section
) -> None:
    """Refuse a tower whose features do not fit, or that is not the one of the config."""
    name = original.string("mm_vision_tower", "")
    wanted = sizes["multi_modal_projector.linear_1.weight"].shape[1]
    side = re.search(r"-(\d+)$", name)
    if vision["hidden_size"] == wanted and not (side and int(side[1]) != vision["image_size"]):
        return
    raise UsageError(
        f"the vision tower has {vision['hidden_size']} features of pictures of"
        f" {vision['image_size']} pixels; the model was trained with {wanted}, on"
        f" {name[:100] or 'another tower'}",
        hint=f"name the folder of {name[:100] or 'its own tower'}: --vision-tower",
    )


def _file_names(files: list[str], more: int) -> list[str]:
    """Names of the weight files: as they were where they are safetensors and no file joins them."""
    if not more and all(name.endswith(".safetensors") for name in files):
        return files
    count = len(files) + more
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _copied(folder: str) -> list[str]:
    """What goes along unchanged: all files of the folder itself that are no weights."""
    return sorted(
        name
        for name in os.listdir(folder)
        if not name.startswith(".")
        and not name.endswith(_WEIGHTS)
        and os.path.isfile(os.path.join(folder, name))
    )
