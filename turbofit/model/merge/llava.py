"""Converts the original LLaVA (`LlavaLlamaForCausalLM`) to the hf format that LMDeploy runs.

| original | hf |
|---|---|
| ``model.layers…``, ``model.embed_tokens``, ``model.norm`` | ``language_model.model.…`` |
| ``lm_head`` | ``language_model.lm_head`` |
| ``model.mm_projector.0`` and ``.2`` | ``multi_modal_projector.linear_1`` and ``linear_2`` |
| ``model.vision_tower.vision_tower.vision_model…``, or CLIP's own checkpoint | ``vision_tower.…`` |

The embeddings grow by two tokens and up to a multiple of 64 rows. llava-hf's published conversion
draws the new rows at random around the mean of the others; here each is that mean, so that the same
input gives the same output. The new embeddings have no effect: the image token's is replaced by the
picture's, padding is masked. A new token's logit is the mean of the others, never the largest.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.units import round_up
from turbofit.model.config import Section, parse_json
from turbofit.model.folder import FolderFiles
from turbofit.model.hub_cache import cached_snapshot
from turbofit.model.merge.llava_files import FEATURES
from turbofit.model.merge.llava_tokens import Tokens
from turbofit.model.merge.shards import ShardPiece, open_shards
from turbofit.model.merge.tensors import FLOATS, StoredTensor

__all__ = ["ORIGINAL", "Tower", "check_original", "grown_rows", "hf_name", "read_tower", "template"]

#: The architecture that is converted.
ORIGINAL: Final = "LlavaLlamaForCausalLM"

_ROWS: Final = 64
_TOWER: Final = "vision_tower.vision_model."
_PROJECTOR: Final = re.compile(r"model\.mm_projector\.([02])\.(weight|bias)")
_TUNED_TOWER: Final = re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)")
_OTHERS: Final = "take the conversion that llava-hf publishes for this model"


class Tower(NamedTuple):
    """A vision tower: its tensors, its config.json, and where it came from."""

    pieces: tuple[ShardPiece, ...]
    config: Section | None
    where: str


def check_original(config: Section) -> None:
    """Refuse what the hf format of LLaVA-1.5 cannot say.

    Raises:
        UsageError: another projector, tower, merging of tiles or token scheme.
    """
    kind = config.string("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise UsageError(
            f"{config.what}: mm_projector_type {kind[:30]!r} has no place in the hf format, which"
            " has two layers with GELU between them",
            hint=_OTHERS,
        )
    aspect, merge = (
        config.string("image_aspect_ratio", ""),
        config.string("mm_patch_merge_type", ""),
    )
    if aspect.startswith("anyres") or merge not in ("", "flat"):
        raise UsageError(
            f"{config.what}: this is LLaVA-NeXT (pictures in tiles), only LLaVA-1.5 is converted",
            hint=_OTHERS,
        )
    if config.boolean("mm_use_im_start_end", False):
        raise UsageError(
            f"{config.what}: mm_use_im_start_end puts tokens around each picture, which the hf"
            " format does not",
            hint=_OTHERS,
        )
    if config.string("mm_vision_select_feature", "patch") not in FEATURES:
        raise config.error("mm_vision_select_feature", "is neither patch nor cls_patch")
    if "siglip" in config.string("mm_vision_tower", "").lower():
        raise UsageError(f"{config.what}: its vision tower is SigLIP, not CLIP", hint=_OTHERS)


def hf_name(name: str) -> str | None:
    """A tensor's name in the hf format; None for buffers that are computed anew.

    Raises:
        UsageError: not a tensor of LLaVA-1.5.
    """
    if name.endswith((".inv_freq", ".position_ids")) or name == "model.image_newline":
        return None
    if match := _PROJECTOR.fullmatch(name):
        layer = "linear_1" if match[1] == "0" else "linear_2"
        return f"multi_modal_projector.{layer}.{match[2]}"
    if match := _TUNED_TOWER.fullmatch(name):
        return _TOWER + match[1]
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
        return f"language_model.{name}"
    raise UsageError(f"{name[:100]!r} is not a tensor of the original LLaVA-1.5", hint=_OTHERS)


def grown_rows(tokens: Tokens, rows: int) -> int:
    """Rows of the embeddings with the added tokens, a multiple of 64."""
    return round_up(max(rows, tokens.image + 1, tokens.pad + 1), _ROWS)


def read_tower(name: str, given: str | None, dtype: str) -> Tower:
    """The vision tower's own checkpoint.

    Args:
        name: ``mm_vision_tower`` of the config, a hub id or a folder.
        given: ``--vision-tower``, None where it was not given.
        dtype: the dtype that its weights become (safetensors' name).

    Raises:
        UsageError: it is not on this machine, or is not CLIP.
    """
    folder = _tower_folder(name, given)
    data = FolderFiles(folder).read("config.json")
    config = parse_json(data, "the vision tower's config.json") if data else None
    kind = config.string("model_type", "clip") if config else "clip"
    if kind not in ("clip", "clip_vision_model"):
        raise UsageError(f"{folder} is {kind[:30]!r}, not CLIP", hint="name CLIP's folder")
    pieces = []
    for shard in open_shards(folder):
        for key in shard.names:
            if not key.startswith("vision_model.") or key.endswith(".position_ids"):
                continue
            stored = shard.store.entries[key]
            to = dtype if stored.dtype in FLOATS else stored.dtype
            piece = ShardPiece(
                f"vision_tower.{key}", StoredTensor(to, stored.shape), shard.store, key
            )
            pieces.append(piece)
    if not pieces:
        raise UsageError(
            f"{folder} holds no vision_model.… tensors", hint="name the folder of CLIP's checkpoint"
        )
    return Tower(tuple(pieces), config, folder)


def _tower_folder(name: str, given: str | None) -> str:
    for wanted in (given, name):
        if not wanted:
            continue
        path = os.path.expanduser(wanted)
        if os.path.isdir(path):
            return os.path.abspath(path)
        cached = cached_snapshot(wanted, None)
        if cached:
            return cached
        if given:
            break
    wanted = given or name or "the vision tower"
    raise UsageError(
        f"the checkpoint has no vision tower of its own, and {wanted[:100]} is neither a folder nor"
        " in the local hub cache",
        hint=f"download it (hf download {wanted[:100]}) or name its folder: --vision-tower FOLDER",
    )


def template(folder: str) -> str | None:
    """What to say where LMDeploy would not pick LLaVA's chat template for this path; else None.

    LMDeploy 0.18 goes by the path that it is given, in lower case.
    """
    path = folder.lower()
    first = "llava" in path and "v1" in path and "v1.6-34b" not in path and "mistral" not in path
    if first or "llava-1.5" in path:
        return None
    return (
        "LMDeploy picks the chat template by the folder's name, and this one does not say"
        " llava-v1: it would take the turns from the checkpoint, without LLaVA's system prompt;"
        " name the folder llava-v1.5-… or serve it with --chat-template llava-v1"
    )
