"""Examines a checkpoint of 4 bits: whether it is whole, and whether LMDeploy reads it.

Each packed weight is unpacked by compressed-tensors' layout (eight 4-bit integers in an int32, the
first in the lowest bits, 8 added to each; one scale for each group of inputs), and compared with
what LMDeploy's own class makes of it, and with the 16-bit weight that it was made from. One tensor
at a time is in memory.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Final

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, Quantization
from turbofit.core.process.progress import Step, tell
from turbofit.core.struct import JsonDocument, Struct, const, doc
from turbofit.core.units import grouped
from turbofit.model.families.engines import engine_problem
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.files import copied_files, torch_library
from turbofit.model.safetensors import Tensor
from turbofit.model.source import resolve_model

SCHEMA: Final = "turbofit.quantized/1"
PACKED: Final = ".weight_packed"
_SCALE: Final = ".weight_scale"
_WEIGHT: Final = ".weight"
#: Integers in an int32, and what is added to each.
_IN_A_WORD: Final = 8
_OFFSET: Final = 8
#: The largest error of a group, as a share of its weights' norm: 4 bits give about 0.1, GPTQ more.
_LARGEST_ERROR: Final = 0.9
#: The most problems of one kind that are named.
_SHOWN: Final = 5
#: The end of the name of a tensor with all experts of a layer.
_STACKED: Final = re.compile(r"(?<=[.]experts)[.](?:gate_up|down)_proj$")
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_BUFFER: Final = ".rotary_emb.inv_freq"
_HEAD: Final = "lm_head.weight"
_ENGINES: Final = ("turbomind", "pytorch")
#: Files of a checkpoint that are not needed beside the weights.
_NOT_NEEDED: Final = (".md", ".png", ".jpg", ".gitattributes", "LICENSE", "NOTICE")


class Layers(Struct):
    """Tensors whose names differ only in numbers, which are written as ``N``."""

    name: str
    count: int
    packed: Annotated[bool, doc("Whether they have 4 bits.")]
    bytes: int


class Reading(JsonDocument):
    """What `turbofit quantize MODEL --read OUT` found; ``good`` if there is no problem."""

    what: ClassVar[str] = "a reading of a checkpoint"

    schema: Annotated[str, const(SCHEMA)] = SCHEMA
    folder: str
    good: bool
    problems: tuple[str, ...]
    engines: Annotated[
        dict[str, str], doc("Why an engine of LMDeploy does not read it; empty: it does.")
    ]
    group_size: int
    layers: tuple[Layers, ...]
    packed: Annotated[int, doc("Packed tensors that were read.")]
    equal: Annotated[
        bool | None, doc("Whether LMDeploy's class gives the same bits; null: it cannot run here.")
    ]
    compared: Annotated[bool, doc("Whether the 16-bit weights were there to compare with.")]
    worst_error: Annotated[float, doc("The largest error of a tensor, by its norm; 0: not known.")]


def read_result(source: Model, folder: str) -> Reading:
    """Examine the checkpoint in ``folder``, which was made of the model ``source``.

    Raises:
        UsageError: the folder holds no checkpoint, its config is what no engine of LMDeploy reads,
            or its weights are not in compressed-tensors' format.
        PackageError: torch or safetensors is missing.
    """
    result = resolve_model(folder)
    packing = result.quantization
    if packing is None or packing.method != "compressed-tensors":
        stored = "16 bits" if packing is None else packing.method
        raise UsageError(
            f"{folder} holds {stored}, not compressed-tensors",
            hint=f"turbofit plan {folder} plans it as it is",
        )
    if source.architecture != result.architecture:
        raise UsageError(
            f"{folder} is a {result.architecture}, and the model a {source.architecture}",
            hint="name the model that it was made of",
        )
    tensors = dict(FolderFiles(result.source.where).weights().tensors or {})
    where = source.source.checkpoint
    originals = dict(FolderFiles(where).weights().tensors or {}) if where else {}
    comparison = _Comparison(result.source.where, tensors, where, originals, packing)
    wanted = [name for name in originals if not _is_left_out(name, source)]
    problems = [*_absent(tensors, wanted), *_files(result.source.where, where)]
    problems += _mixed(tensors)
    problems += comparison.problems()
    engines = {name: engine_problem(result, name) or "" for name in _ENGINES}
    if all(engines.values()):
        problems += engines.values()
    return Reading(
        folder=folder,
        good=not problems,
        problems=tuple(problems),
        engines=engines,
        group_size=packing.group_size,
        layers=tuple(_layers(tensors)),
        packed=len(comparison.names),
        equal=comparison.equal,
        compared=bool(originals),
        worst_error=comparison.worst,
    )


def _plain(name: str) -> str:
    """Return a tensor's name in the 16-bit checkpoint: a packed weight's is that of its weight."""
    return name.removesuffix(PACKED) + _WEIGHT if name.endswith(PACKED) else name


def _is_left_out(name: str, source: Model) -> bool:
    """Return whether Transformers saves no such tensor: a buffer, or a copy of a tied head."""
    is_tied = name.endswith(_HEAD) and source.text.tie_word_embeddings
    return is_tied or name.endswith(_BUFFER)


def _absent(tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> Iterator[str]:
    """Yield which ``wanted`` tensors of the 16-bit checkpoint are missing; which have no scales.

    Experts that are stacked in one tensor there have a tensor each here.
    """
    here = {_plain(name) for name in tensors}
    here |= {name.partition(".experts.")[0] + ".experts" for name in tensors}
    missing = [name for name in wanted if _STACKED.sub("", name) not in here]
    yield from _few("is missing", missing)
    without = [name for name in tensors if name.endswith(PACKED) and _scale_of(name) not in tensors]
    yield from _few("has no weight_scale", without)


def _files(folder: str, source: str | None) -> Iterator[str]:
    """Yield which files beside the weights the source has and the result has not."""
    if source is None:
        return
    missing = set(copied_files(source, (), _NOT_NEEDED)) - set(os.listdir(folder))
    yield from _few("is missing beside the weights", sorted(missing))


def _mixed(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield experts of a layer that are packed in part: TurboMind joins all experts of a layer."""
    kinds = defaultdict(set)
    for name in tensors:
        layer, dot, rest = name.partition(".experts.")
        if dot and _plain(name).endswith(_WEIGHT):
            kinds[f"{layer}.experts ({rest.split('.')[1]})"].add(name.endswith(PACKED))
    yield from _few("has 4 bits in part", [name for name, kind in kinds.items() if len(kind) > 1])


def _few(what: str, names: list[str]) -> Iterator[str]:
    """Yield a problem for each of the first names, and how many more there are."""
    for name in names[:_SHOWN]:
        yield f"{name} {what}"
    if len(names) > _SHOWN:
        yield f"{len(names) - _SHOWN} more: {what}"


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[Layers]:
    """Yield the tensors of the result by class of layer."""
    weights = {
        name: tensor
        for name, tensor in tensors.items()
        if name.endswith((PACKED, _WEIGHT)) and len(tensor.shape) > 1
    }
    by_class = grouped((_NUMBER.sub("N", name), name) for name in weights)
    for name, members in by_class.items():
        yield Layers(
            name=name,
            count=len(members),
            packed=name.endswith(PACKED),
            bytes=sum(weights[member].bytes for member in members),
        )


def _scale_of(name: str) -> str:
    return name.removesuffix(PACKED) + _SCALE


class _Comparison:
    """Reads every packed weight once; ``problems`` does the work."""

    def __init__(
        self,
        folder: str,
        tensors: Mapping[str, Tensor],
        source: str | None,
        originals: Mapping[str, Tensor],
        packing: Quantization,
    ) -> None:
        self.names = [
            name for name in tensors if name.endswith(PACKED) and _scale_of(name) in tensors
        ]
        self.worst = 0.0
        self._group = packing.group_size
        self._lmdeploy = _lmdeploy_format(packing.group_size)
        self.equal = None if self._lmdeploy is None else True
        self._packed = _Opened(folder, tensors)
        self._originals = _Opened(source or folder, originals)

    def problems(self) -> list[str]:
        """Return what is wrong with packed weights, the first of each tensor."""
        found = []
        for number, name in enumerate(self.names, 1):
            tell(Step("reading packed weights", number, len(self.names), ""))
            if problem := self._problem(name):
                found.append(f"{name}: {problem}")
        return [*_few("", found)] if len(found) > _SHOWN else found

    def _problem(self, name: str) -> str:
        """Return what is wrong with one packed weight; empty if nothing is."""
        packed, scale = self._packed.tensor(name), self._packed.tensor(_scale_of(name))
        shape = (packed.shape[0], packed.shape[1] * _IN_A_WORD // self._group)
        if tuple(scale.shape) != shape:
            return f"its scales are {tuple(scale.shape)}, not {shape} for groups of {self._group}"
        whole = unpacked(packed)
        steps = scale.repeat_interleave(self._group, dim=1)
        wrong = ~scale.isfinite() | ((scale <= 0) & _uses(whole, self._group))
        if bool(wrong.any()):
            return f"the scale of {_place(wrong)} is {float(scale[wrong][0])}"
        weight = whole.to(scale.dtype) * steps
        if self._lmdeploy is not None and not weight.equal(self._read_by_lmdeploy(packed, scale)):
            self.equal = False
            return "LMDeploy's class makes other weights of it"
        return self._error(name, weight, _uses(whole, self._group))

    def _read_by_lmdeploy(self, packed: Any, scale: Any) -> Any:
        """Return the weight as LMDeploy's class unpacks it, outputs first."""
        read = self._lmdeploy
        scales = read.normalize(scale, "scales")
        tensors = {
            "weight": read.normalize(packed, "weight"),
            "scales": scales,
            "zeros": read.synthesize_zeros(scales),
        }
        return read.dequant(tensors, scale.dtype)["weight"].t()

    def _error(self, name: str, weight: Any, used: Any) -> str:
        """Compare with the 16-bit weight; return which group is far from it, or an empty text.

        GPTQ makes zeros of weights whose inputs were zero in all samples, so groups that are not
        ``used`` do not count.
        """
        original = self._originals.tensor(_plain(name))
        if original is None:
            return ""
        if original.shape != weight.shape:
            return f"it is {tuple(weight.shape)}, the 16-bit weight {tuple(original.shape)}"
        original = original.float()
        difference = weight.float() - original
        self.worst = max(self.worst, float(difference.norm() / original.norm()))
        groups = (-1, weight.shape[1] // self._group, self._group)
        errors = difference.reshape(groups).norm(dim=2)
        far = used & (errors > _LARGEST_ERROR * original.reshape(groups).norm(dim=2))
        return f"the scale of {_place(far)} is far from the 16-bit weights" if far.any() else ""


def unpacked(packed: Any) -> Any:
    """Return the integers from -8 to 7 in int32 words: (outputs, inputs / 8) to (outputs, inputs).

    Source: compressed-tensors 0.19.0, `compressors/pack_quantized/helpers.py`.
    """
    torch = torch_library()
    shifts = torch.arange(0, 4 * _IN_A_WORD, 4, dtype=torch.int32)
    digits = (packed.unsqueeze(-1) >> shifts) & 0xF
    return digits.reshape(packed.shape[0], -1).to(torch.int8) - _OFFSET


def _uses(whole: Any, group: int) -> Any:
    """Return for each group of inputs whether any of its integers is not 0."""
    return whole.reshape(whole.shape[0], -1, group).ne(0).any(dim=2)


def _place(wrong: Any) -> str:
    """Return the first true place of a matrix, in words."""
    output, group = wrong.nonzero()[0].tolist()
    return f"output {output}, group {group}"


class _Opened:
    """The tensors of a folder, each read when it is asked for."""

    def __init__(self, folder: str, tensors: Mapping[str, Tensor]) -> None:
        self._folder, self._tensors = folder, tensors
        self._files: dict[str, Any] = {}

    def tensor(self, name: str) -> Any:
        """Return a torch tensor; None if the folder has none of this name."""
        if name not in self._tensors:
            return None
        torch_library()
        file = self._tensors[name].file
        if file not in self._files:
            opener = importlib.import_module("safetensors").safe_open
            self._files[file] = opener(os.path.join(self._folder, file), "pt")
        return self._files[file].get_tensor(name)


def _lmdeploy_format(group: int) -> Any:
    """Return LMDeploy's own reader of such weights; None where it cannot be imported.

    Source: lmdeploy turbomind/weight_format.py::CompressedTensorFormat #c2d426
    """
    # Without a driver the module's import fails where it first uses TurboMind's library.
    with suppress(ImportError, OSError, RuntimeError, AttributeError):
        module = importlib.import_module("lmdeploy.turbomind.weight_format")
        return module.CompressedTensorFormat(block_in=group)
    return None
