"""Writes a twin of a model: a stand-in checkpoint that has headers, but no weights.

The files of weights are sparse and as long as real files: a loader that maps a file reads zeros.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Draft, Model, TextDims
from turbofit.core.presets import merged
from turbofit.core.struct import JsonObject
from turbofit.model.tensors import Tensor, text_tensors
from turbofit.model.towers import tower_tensors
from turbofit.rehearsal.checkpoint.naming import (
    Decoder,
    Entry,
    Kind,
    Values,
    Writer,
    config_from,
    kinds,
    need_names,
    values_of,
)
from turbofit.rehearsal.checkpoint.tokenizer import (
    Tokenizer,
    common,
    special_tokens,
    write_tokenizer,
)

#: The method and the group size of each packing that a twin can have: awq has 4 bits, fp8 has
#: blocks of 128 x 128. mxfp4 packs only the experts of gpt-oss, compressed-tensors only experts.
_PACKED: Final = {("awq", 128), ("fp8", 128), ("mxfp4", 32), ("compressed-tensors", 32)}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1, "F8_E4M3": 1}
_SHARD = 8 << 30
#: Endings of tensors' names. ``_WEIGHT_SHAPE``: a tensor with the two numbers of a weight's shape
#: before packing, which LMDeploy compares with the model's own. ``_PACKED_WEIGHT``: this weight.
_WEIGHT_SHAPE, _PACKED_WEIGHT = ".weight_shape", ".weight_packed"
_IN_A_WORD = 8


@dataclasses.dataclass(frozen=True)
class Twin:
    """A model, and the kinds of checkpoint from which its stand-in checkpoint is written.

    Attributes:
        decoder: the kind of the model's decoder.
        whole: the kind of the model around the decoder; None if there is only the decoder.
    """

    model: Model
    decoder: Kind
    whole: Kind | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None if self.whole is None else self.whole.tokenizer

    @property
    def ids(self) -> dict[str, int]:
        return special_tokens(self.model.text.vocab, self.tokenizer)

    @property
    def values(self) -> Values:
        values = values_of(self.model, self.ids)
        return {**values, **(self.whole.names if self.whole else {}), **self.decoder.names}


def twin_of(model: Model) -> Twin:
    """Return a model's twin.

    Raises:
        UsageError: no twin can be made, so the model's own checkpoint is needed.
    """
    _refuse_packing(model)
    decoder = kinds().get(model.text.architecture)
    if decoder is None or decoder.decoder is not None:
        raise _no_twin(model.text.architecture)
    if model.vision is None:
        return Twin(model, decoder)
    whole = kinds().get(model.architecture)
    if whole is None or (whole.decoder is None and whole is not decoder):
        raise _no_twin(f"a vision tower of {model.architecture}")
    return Twin(model, decoder, whole)


def _refuse_packing(model: Model) -> None:
    """Refuse a model whose packed weights a twin cannot have.

    Raises:
        UsageError: a twin cannot have these weights.
    """
    packed = model.quantization
    if packed is None:
        return
    way = (packed.method, packed.group_size)
    every = not packed.of_experts
    # All layers together are packed only without latent attention, and not by compressed-tensors.
    unmade = every and (model.text.mla is not None or way == ("compressed-tensors", 32))
    if unmade or way not in _PACKED:
        raise _no_twin(f"{packed.method} weights")


def _no_twin(what: str) -> UsageError:
    return UsageError(
        f"no stand-in checkpoint is made for {what}",
        hint="give the folder of its checkpoint; docs/pretend.md lists what has no stand-in",
    )


def config_of(twin: Twin) -> JsonObject:
    """Return the content of a twin's ``config.json``."""
    model, quantized, whole = twin.model, "", twin.whole
    template = {"architectures": [model.text.architecture], **twin.decoder.config}
    if whole is not None and whole.decoder is not None:
        around = {"architectures": [model.architecture], **whole.config}
        template = merged(_nested(whole.decoder.config, template), around)
        quantized = whole.decoder.quantized
    quantization = model.quantization
    if quantization is not None:
        packing = dict(common()["packings"][quantization.method])
        if quantization.method == "awq" and quantization.unconverted:
            packing["modules_to_not_convert"] = list(quantization.unconverted)
        template = merged(_nested(quantized, {"quantization_config": packing}), template)
    config: JsonObject = config_from(template, twin.values)
    if model.draft and model.draft.is_own:
        config["num_nextn_predict_layers"] = model.draft.text.layers
    if quantization is None:
        config.pop("quantization_config", None)
    return config


def _nested(path: str, data: JsonObject) -> JsonObject:
    """Nest a mapping under the keys of a dotted path."""
    for key in reversed(path.split(".") if path else []):
        data = {key: data}
    return data


def tensors(twin: Twin) -> Iterator[Entry]:
    """Yield all tensors of a twin, in the order of the files in `presets/checkpoints`.

    Raises:
        UsageError: a tensor has no name in these files.
    """
    whole, names = twin.whole, twin.decoder.tensors
    names = names if whole is None else merged(names, whole.tensors)
    place = (whole and whole.decoder) or Decoder()
    text, draft = twin.model.text, twin.model.draft
    if draft and draft.is_own:
        yield from _draft_entries(draft, text.layers)
        text = _with_layers(text, draft.text.layers)
    for name, dtype, shape in _entries(twin.model, names, text_tensors(text)):
        inside = name.removeprefix("model.")
        yield (place.model + inside if inside != name else place.head + name), dtype, shape
    if whole is not None and (vision := twin.model.vision) is not None:
        towers = tower_tensors(vision, twin.model.text.hidden)
        yield from _entries(twin.model, whole.tower, towers, whole.at)


def _with_layers(text: TextDims, more: int) -> TextDims:
    """Return the dimensions with ``more`` layers, which are as the last one."""
    moe = text.moe and replace(text.moe, layers=text.moe.layers + more)
    return replace(text, layers=text.layers + more, moe=moe)


def _draft_entries(draft: Draft, after: int) -> Iterator[Entry]:
    """Yield what layers of a draft have in addition; the first has the number ``after``.

    Source: lmdeploy models/deepseek_mtp.py::DeepSeekMultiTokenPredictorLayer.__init__ #f114c4
    """
    hidden, rows = draft.text.hidden, draft.text.vocab
    shapes = {
        "embed_tokens": (rows, hidden), "enorm": (hidden,), "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,),
        "shared_head.head": (rows, hidden),
    }  # fmt: skip
    for layer in range(after, after + draft.text.layers):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", "BF16", shape


def _entries(
    model: Model, names: JsonObject, tensors: Iterable[Tensor], prefix: str = ""
) -> Iterator[Entry]:
    """Yield the tensors of a decoder or of towers; all names begin with ``prefix``."""
    by_role = {tensor.role: tensor for tensor in tensors}
    need_names(names, by_role)
    dtype = "F16" if model.dtype == "float16" else "BF16"
    return Writer(by_role, dtype, model.quantization).entries(names, prefix)


def write_header(
    path: Path, entries: Iterable[Entry], stored: Mapping[str, tuple[int, int]]
) -> None:
    """Write a sparse safetensors file, whose tensors have no data.

    A tensor that states the shape of a packed weight is the exception: ``stored`` has its two
    numbers, which are written as its data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "turbofit": "pretend: no data"}}
    offset, shapes = 0, b""
    ordered = sorted(entries, key=lambda entry: entry[0].endswith(_WEIGHT_SHAPE))
    for name, dtype, shape in ordered:
        if name.endswith(_WEIGHT_SHAPE):
            shapes += struct.pack("<2i", *stored[name])
        size = _BYTES[dtype] * prod(shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)
    if shapes:
        with path.open("r+b") as file:
            file.seek(-len(shapes), os.SEEK_END)
            file.write(shapes)


def write_weights(entries: Iterable[Entry], folder: Path) -> None:
    """Write the tensors' headers into one file, or into several files with an index.

    A file has 8 GiB at most, since Linux cannot map a file that is larger than the host's memory.
    """
    shards: list[list[Entry]] = []
    room = 0
    shapes: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry[0].endswith(_PACKED_WEIGHT):
            outs, words = entry[2]
            shapes[entry[0].removesuffix(_PACKED_WEIGHT) + _WEIGHT_SHAPE] = outs, words * _IN_A_WORD
        size = _BYTES[entry[1]] * prod(entry[2])
        if size > room:
            shards.append([])
            room = _SHARD
        shards[-1].append(entry)
        room -= size
    count, names = len(shards), ["model.safetensors"]
    if count > 1:
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        pairs = zip(names, shards, strict=True)
        weight_map = {entry[0]: name for name, shard in pairs for entry in shard}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        write_header(folder / name, shard, shapes)


def write_model(twin: Twin, folder: Path) -> Path:
    """Write all files of a twin into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": config_of(twin)}
    if twin.whole is not None:
        preprocessor = config_from(twin.whole.preprocessor, twin.values)
        files |= {"preprocessor_config.json": preprocessor}
        if twin.whole.processor:
            files["processor_config.json"] = twin.whole.processor
        if twin.whole.video_processor:
            video = {k: v for k, v in preprocessor.items() if k != "image_processor_type"}
            video["video_processor_type"] = twin.whole.video_processor
            files["video_preprocessor_config.json"] = video
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=1), encoding="utf-8")
    write_weights(tensors(twin), folder)
    positions = twin.model.text.max_position_embeddings
    write_tokenizer(folder, twin.ids, positions, twin.tokenizer)
    return folder


def need_stand_in(model: Model) -> None:
    """Refuse a model whose weights are not on disk and for which no twin can be made.

    Raises:
        UsageError: no twin can be made.
    """
    if _on_disk(model) is None:
        twin_of(model)


def _on_disk(model: Model) -> Path | None:
    """Return the folder with the model's weights; None if they are not on disk."""
    checkpoint = Path(model.source.checkpoint or model.source.where)
    whole = model.source.kind in ("folder", "hub_cache") and any(checkpoint.glob("*.safetensors"))
    return checkpoint if whole else None


def checkpoint_for(model: Model, folder: Path, *, torch: bool = False) -> Path:
    """Return the model's own folder if its weights are on disk, else a twin made in ``folder``.

    ``torch``: the engine runs on torch, which runs no gated delta nets on pretend GPUs.

    Raises:
        UsageError: no twin can be made, or the engine cannot run this model on pretend GPUs.
    """
    if torch and model.text.delta is not None:
        # Source: lmdeploy nn/gated_delta.py `from fla.modules import`
        raise UsageError(
            f"pretend GPUs do not run {model.text.architecture} under torch: its gated delta nets"
            " need kernels of fla and TileLang, which are compiled and tuned on a real card",
            hint="--engine turbomind, if TurboMind runs this model; if not, turbofit plan without"
            " --rehearse",
        )
    return _on_disk(model) or write_model(twin_of(model), folder)
