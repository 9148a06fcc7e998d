"""Converts the original LLaVA (`LlavaLlamaForCausalLM`) to the hf format that LMDeploy runs.

| original | hf |
|---|---|
| ``model.layers…``, ``model.embed_tokens``, ``model.norm`` | ``language_model.model.…`` |
| ``lm_head`` | ``language_model.lm_head`` |
| ``model.mm_projector.0`` and ``.2`` | ``multi_modal_projector.linear_1`` and ``linear_2`` |
| ``model.vision_tower.vision_tower.vision_model…``, or CLIP's own checkpoint | ``vision_tower.…`` |

The original cuts a prompt at the text ``<image>``. The hf format has a token for an image, and a
token for padding. Both tokens are appended to the tokenizer, as in llava-hf's checkpoints.

The embeddings grow by two tokens and up to a multiple of 64 rows. In llava-hf's checkpoints, the
new rows are random, around the mean of the other rows. Here each new row is that mean, so that the
same input gives the same output. The new rows have no effect: the picture's features replace the
image token's row, padding is masked, and a new token's logit is never the largest, since it is the
mean of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import JsonObject
from turbofit.core.units import round_up
from turbofit.model.checkpoint import read_section
from turbofit.model.config import Section
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.files import (
    Edit,
    Piece,
    Result,
    Tensors,
    copied_files,
    dtype_name,
    json_text,
    located,
    open_weights,
    piece,
    weight_files,
)

#: Tokenizer files that are not copied: the first lacks the new tokens, the others are rewritten.
_TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip

_IMAGE: Final = "<image>"
_PAD: Final = "<pad>"
#: The architecture that this module converts.
ORIGINAL: Final = "LlavaLlamaForCausalLM"

#: vision_feature_select_strategy of the hf format, by mm_vision_select_feature of the original.
_FEATURES: Final = {"patch": "default", "cls_patch": "full"}
_ROWS: Final = 64
#: Rows that are summed at once: the whole table in float64 would need four times its memory.
_BLOCK: Final = 1024
_TOWER: Final = "vision_tower.vision_model."
_EMBEDDINGS: Final = "language_model.model.embed_tokens.weight"
_HEAD: Final = "language_model.lm_head.weight"
#: The projector's layers: the name in the hf format, by the name in the original.
PROJECTOR: Final = {"0": "linear_1", "2": "linear_2"}
_PROJECTOR: Final = re.compile(r"model\.mm_projector\.([02])\.(weight|bias)")
_TUNED_TOWER: Final = re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)")
#: Keys that CLIP's vision config must have.
_SIZES: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "patch_size",
)  # fmt: skip
#: Keys that CLIP's vision config may have.
_VISION_KEYS: Final = ("num_channels", "hidden_act", "layer_norm_eps", "projection_dim")
_FIRST: Final = "multi_modal_projector.linear_1.weight"
_OTHERS: Final = "take the conversion that llava-hf publishes for this model"


class _Tokens(NamedTuple):
    """The ids of the new tokens ``<image>`` and ``<pad>``, and the new tokenizer files."""

    image: int
    pad: int
    files: dict[str, str]


def check_original(config: Section) -> None:
    """Refuse an original model that LLaVA-1.5's hf format cannot express.

    Raises:
        UsageError: the config has a setting that the hf format lacks.
    """
    projector = config.string("mm_projector_type", "linear")
    tiles = config.string("image_aspect_ratio", "").startswith("anyres")
    tiles = tiles or config.string("mm_patch_merge_type", "") not in ("", "flat")
    refused = {
        f"mm_projector_type {projector[:30]!r} has no place in the hf format, which has two layers"
        " with GELU between them": projector != "mlp2x_gelu",
        "this is LLaVA-NeXT (pictures in tiles), only LLaVA-1.5 is converted": tiles,
        "mm_use_im_start_end puts tokens around each picture, and the hf format has none":
            config.boolean("mm_use_im_start_end", False),
        "mm_vision_select_feature is not patch or cls_patch":
            _selected_feature(config) not in _FEATURES,
        "its vision tower is SigLIP, not CLIP":
            "siglip" in config.string("mm_vision_tower", "").lower(),
    }  # fmt: skip
    if why := next((why for why, is_so in refused.items() if is_so), None):
        raise UsageError(f"{config.what}: {why}", hint=_OTHERS)


def converted(
    original: Section,
    folder: str,
    files: Mapping[str, Mapping[str, Piece]],
    projector: Tensors,
    vision_tower: str | None,
    dtype: Any,
) -> Result:
    """Convert to the hf format: rename tensors, add two tokens and the vision tower.

    Args:
        original: config.json of the original format.
        folder: the base, which has the tokenizer.
        files: the base's tensors, changed by the merge.
        projector: the adapter's projector, under its names in the original format.
        vision_tower: the value of ``--vision-tower``.
        dtype: the dtype of the result.
    """
    tokens = add_tokens(folder, original.integer("vocab_size"))
    renamed = [
        {new: entry for name, entry in pieces.items() if (new := hf_name(name))}
        for pieces in files.values()
    ]
    besides = {hf_name(name) or name: piece(tensor, dtype) for name, tensor in projector.items()}
    name = vision_tower or original.string("mm_vision_tower", "") or "the vision tower"
    where = located(name, "config.json", "CLIP's folder: --vision-tower FOLDER")
    what = "the vision tower's config.json"
    tower = read_section(FolderFiles(where), "config.json", what) or Section({}, what)
    # A checkpoint without tensors of the tower has CLIP's own tower.
    tuned = any(name.startswith(_TOWER) for pieces in renamed for name in pieces)
    if not tuned:
        besides |= _tower_pieces(where, dtype)
    if besides:
        renamed.append(besides)
    shapes = {name: entry.tensor.shape for pieces in renamed for name, entry in pieces.items()}
    _check_complete(set(shapes), original)
    vision = _vision_config(tower.section("vision_config") or tower, original, shapes[_FIRST][1])
    rows = round_up(max(shapes[_HEAD][0], tokens.image + 1, tokens.pad + 1), _ROWS)
    for pieces in renamed:
        for name in pieces.keys() & {_EMBEDDINGS, _HEAD}:
            grow: Edit = partial(_with_rows, rows)
            pieces[name] = pieces[name]._replace(edits=(*pieces[name].edits, grow))
    shared_keys = {
        "vocab_size": rows,
        "pad_token_id": tokens.pad,
        "torch_dtype": dtype_name(dtype),
    }
    texts = _small_files(original, vision, tokens, FolderFiles(folder), shared_keys)
    skipped = {*texts, *_TOKENIZER_FILES, "chat_template.json"}
    return Result(
        files=weight_files(renamed),
        texts=texts,
        copies=copied_files(folder, skipped, (".py",)),
        architecture="LlavaForConditionalGeneration",
        tower=None if tuned else where,
    )


def hf_name(name: str) -> str | None:
    """Return a tensor's name in the hf format; None for buffers that a program computes again.

    Raises:
        UsageError: the original format has no such tensor.
    """
    if name.endswith((".inv_freq", ".position_ids")) or name == "model.image_newline":
        return None
    if match := _PROJECTOR.fullmatch(name):
        return f"multi_modal_projector.{PROJECTOR[match[1]]}.{match[2]}"
    if match := _TUNED_TOWER.fullmatch(name):
        return _TOWER + match[1]
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
        return f"language_model.{name}"
    raise UsageError(f"{name[:100]!r} is not a tensor of the original LLaVA-1.5", hint=_OTHERS)


def _with_rows(rows: int, weight: Any) -> Any:
    """Grow a table to ``rows`` rows; each new row is the mean of the existing ones."""
    total = sum(part.double().sum(dim=0) for part in weight.split(_BLOCK))
    grown = weight.new_empty((rows, weight.shape[1]))
    grown[: weight.shape[0]] = weight
    grown[weight.shape[0] :] = (total / weight.shape[0]).to(weight.dtype)
    return grown


def _tower_pieces(folder: str, dtype: Any) -> dict[str, Piece]:
    """Read the vision tower from CLIP's checkpoint; return tensors by names in the hf format."""
    pieces = {
        f"vision_tower.{key}": piece(tensor, dtype)
        for tensors in open_weights(folder).values()
        for key, tensor in tensors.items()
        if key.startswith("vision_model.") and not key.endswith(".position_ids")
    }
    if not pieces:
        raise UsageError(
            f"{folder} holds no vision_model.… tensors", hint="name the folder of CLIP's checkpoint"
        )
    return pieces


def _check_complete(names: set[str], original: Section) -> None:
    """Refuse a result without projector, embeddings, head or a layer of the language model."""
    needed = {
        f"multi_modal_projector.linear_{i}.{part}" for i in "12" for part in ("weight", "bias")
    }
    needed |= {_EMBEDDINGS, _HEAD}
    for i in range(original.integer("num_hidden_layers")):
        needed.add(f"language_model.model.layers.{i}.mlp.up_proj.weight")
    if missing := sorted(needed - names):
        raise UsageError(
            f"the result would lack {', '.join(missing[:2])}",
            hint="name the adapter too, if the projector is in its non_lora_trainables.bin"
            if "projector" in missing[-1]
            else "finish the checkpoint's download",
        )


def _vision_config(tower: Section, original: Section, wanted: int) -> JsonObject:
    """Return CLIP's vision config; refuse a tower that the projector was not trained with.

    ``wanted``: the number of features that the projector takes from each patch.
    """
    hidden, size = tower.integer("hidden_size"), tower.integer("image_size")
    name = original.string("mm_vision_tower", "")
    side = re.search(r"-(\d+)$", name)
    if hidden != wanted or (side and int(side[1]) != size):
        raise UsageError(
            f"the vision tower has {hidden} features of pictures of {size} pixels; the model was"
            f" trained with {wanted}, on {name[:100] or 'another tower'}",
            hint=f"name the folder of {name[:100] or 'its own tower'}: --vision-tower",
        )
    sizes = {key: tower.integer(key) for key in _SIZES}
    known = {key: tower.values[key] for key in _VISION_KEYS if key in tower}
    return {**known, **sizes, "model_type": "clip_vision_model"}


def _small_files(
    original: Section,
    vision: JsonObject,
    tokens: _Tokens,
    base: FolderFiles,
    shared_keys: JsonObject,
) -> dict[str, str]:
    """Return the texts of the small files by name: configs, chat template and tokenizer.

    The model's config and the language model's config both have the ``shared_keys``.
    """
    fixed = load_yaml(preset_path("conversions", "llava-1.5"))
    side, strategy = vision["image_size"], _FEATURES[_selected_feature(original)]
    # With "pad", the original pads a picture to a square before scaling it, in the mean colour.
    # CLIP's processor, which llava-hf's checkpoints have, would cut the edges off.
    pad = original.string("image_aspect_ratio", "") == "pad"
    text = {key: original.values[key] for key in fixed["text"] if key in original}
    config = {
        **fixed["config"],
        **shared_keys,
        "image_token_index": tokens.image,
        "image_seq_length": (side // vision["patch_size"]) ** 2 + (strategy == "full"),
        "vision_feature_layer": original.values.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "text_config": {**text, **fixed["text_config"], **shared_keys},
        "vision_config": {**vision, "torch_dtype": shared_keys["torch_dtype"]},
    }
    image = {
        **fixed["preprocessor"],
        **(fixed["padding"] if pad else {}),
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "rescale_factor": 1 / 255,
    }
    processor = {
        **fixed["processor"],
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": strategy,
    }
    files = {
        **tokens.files,
        "config.json": json_text(config),
        "preprocessor_config.json": json_text(image),
        "processor_config.json": json_text(processor),
        "chat_template.jinja": fixed["chat_template"],
    }
    name = "generation_config.json"
    if generation := read_section(base, name):
        files[name] = json_text({**generation.values, "pad_token_id": tokens.pad})
    return files


def _selected_feature(original: Section) -> str:
    return original.string("mm_vision_select_feature", "patch")


def template_warnings(folder: str) -> list[str]:
    """Return a warning if LMDeploy would not choose LLaVA's chat template for this folder.

    LMDeploy chooses the template by the folder's path.
    """
    path = folder.lower()
    first = "llava" in path and "v1" in path and "v1.6-34b" not in path and "mistral" not in path
    if first or "llava-1.5" in path:
        return []
    return [
        "LMDeploy picks the chat template by the folder's name, which does not contain llava-v1:"
        " prompts would lack LLaVA's system prompt; name the folder llava-v1.5-…, or serve it"
        " with --chat-template llava-v1"
    ]


def add_tokens(folder: str, rows: int) -> _Tokens:
    """Return ids for the new tokens ``<image>`` and ``<pad>``, and the new tokenizer files.

    The new ids follow the ids of the model's ``rows`` tokens. Nothing is written to ``folder``.

    Raises:
        UsageError: the folder's tokenizer is not that of the original LLaVA-1.5 and Vicuna.
    """
    files = FolderFiles(folder)
    sections = [read_section(files, name) for name in _TOKENIZER_FILES[1:]]
    config, special, added = (section.values if section else {} for section in sections)
    if added or files.size("tokenizer.model") is None:
        raise UsageError(
            f"{folder} has {'added tokens' if added else 'no tokenizer.model'}, unlike the"
            " original LLaVA-1.5 and Vicuna",
            hint=_OTHERS,
        )
    token_ids = {_IMAGE: rows, _PAD: rows + 1}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = {
        str(number): {"content": token, **flags, "special": True}
        for token, number in token_ids.items()
    }
    written: dict[str, JsonObject] = {
        # The base's chat template is for text only, and is left out.
        "tokenizer_config.json": {
            **{key: value for key, value in config.items() if key != "chat_template"},
            "added_tokens_decoder": {**(config.get("added_tokens_decoder") or {}), **entries},
            "pad_token": _PAD,
            "processor_class": "LlavaProcessor",
        },
        "special_tokens_map.json": {**special, "pad_token": _PAD},
        "added_tokens.json": token_ids,
    }
    texts = {name: json_text(value) for name, value in written.items()}
    return _Tokens(token_ids[_IMAGE], token_ids[_PAD], texts)
