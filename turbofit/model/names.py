"""Reads the names that people type for a model, except folders and presets.

Such a name is a hub id, ``ORG/NAME@REVISION`` or the address of a hub. A hub id without a preset is
compared with presets and with known suffixes; ``presets/families/names.yaml`` lists the suffixes
and hosts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.messages import plain
from turbofit.core.model import Model, Quantization
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import JsonObject
from turbofit.core.version import REFERENCE
from turbofit.model.folder import uses_modelscope
from turbofit.model.parameters import stored_bytes
from turbofit.model.presets import (
    HUB_ID,
    find_preset,
    four_bits,
    known_presets,
    load_preset,
    nearest_names,
    preset_model,
    sizes_of,
)

#: The path of a model's page or file on a hub; a path such as datasets/… names no model.
_ADDRESS: Final = re.compile(
    r"(?:(?:api|v1|models|library)/)*"
    r"(?!(?:api|v1|models|library|datasets|spaces|studios|collections|papers|blog|docs)/)"
    r"(?P<id>[^/@:?#]+/[^/@:?#]+?)(?:\.git)?(?:@(?P<at>[^/:?#]+))?"
    r"(?:/(?:.*?/)?(?:tree|blob|resolve|raw|commits?|view)/(?P<of>refs/\w+/\d+|[^/?#]+))?"
    r"(?:[/?#](?:.*?[?&](?:version|revision)=(?P<asked>[^&#]+))?.*)?",
    re.IGNORECASE,
)
_HUBS: Final = {"hf": "the Hugging Face hub", "modelscope": "ModelScope"}
#: Presets of models that logs call by another name. The original LLaVA and its LoRA have the preset
#: of the checkpoint that `turbofit merge` makes.
_SPELLINGS: Final = (
    (r"llava-?v?1[.-]5-7b|llava-7b", "llava-1.5-7b"),
    (r"llava-?v?1[.-]5-13b", "llava-1.5-13b"),
    (r"llava-?onevision.*7b", "llava-onevision-7b"),
    (r"cogvlm2", "cogvlm2-19b"),
    (r"cogvlm", "cogvlm-17b"),
    (r"llama-?3[.-]2-11b-vision", "llama-3.2-11b-vision"),
)
#: A path or a name in a text, also between Chinese words.
_TOKEN: Final = re.compile(r"[A-Za-z0-9_./-]+")
#: A part of a path with a number, as in the names of most models.
_NUMBERED: Final = re.compile(r"[A-Za-z].*\d")
#: A mention of CogVLM, whose name may have no number.
_COGVLM: Final = re.compile(r"(?<![A-Za-z])[Cc][Oo][Gg]VLM(?![A-Za-z])")


class Name(NamedTuple):
    """A folder, hub id or preset, its revision, and notes on how turbofit read the typed name."""

    text: str
    revision: str | None = None
    notes: tuple[str, ...] = ()


@cache
def _data() -> JsonObject:
    return load_yaml(preset_path("families", "names"))


def read_name(typed: str, revision: str | None = None) -> Name:
    """Read a typed name; a name of no known form is returned unchanged.

    Raises:
        UsageError: the address names no model, or another revision than ``--revision``.
    """
    text = plain(typed).rstrip("/")
    scheme, _, rest = text.rpartition("://")
    host, _, path = rest.partition("/")
    hub_id, _, at_revision = text.partition("@")
    if kind := _data()["schemes"].get(scheme.lower()):
        name = _address(rest, kind, "")
    elif kind := _data()["hosts"].get(host.lower()):
        name = _address(path, kind, host)
    elif scheme:
        raise UsageError(
            f"{host or scheme} is no hub of models that is known",
            hint="name a folder or a hub id (ORG/NAME); for a mirror of the Hugging Face hub set "
            f"HF_ENDPOINT to its address{near_by_name(path)}",
        )
    else:
        name = Name(hub_id, at_revision) if HUB_ID.fullmatch(hub_id) else Name(text)
    named_revision = None if name.revision in ("", "main", "master") else name.revision
    if revision is not None and named_revision not in {None, revision}:
        raise UsageError(
            f"{typed[:120]} names the revision {named_revision}, and `--revision {revision}`",
            hint="leave one of the two out",
        )
    return name._replace(revision=revision or named_revision)


def _address(path: str, kind: str, host: str) -> Name:
    """Return the model that a hub's address names.

    ``path`` is the part of the address after the host, ``kind`` the hub's key in ``_HUBS``.
    """
    path = unquote(path)
    match = _ADDRESS.fullmatch(path)
    if match is None or not HUB_ID.fullmatch(match["id"]):
        raise UsageError(
            f"{host}/{path[:120]} is the address of no model",
            hint="name the model's page, or its hub id (ORG/NAME)",
        )
    hub, note = "modelscope" if uses_modelscope() else "hf", ""
    if kind and kind != hub:
        note = f"the address is of {_HUBS[kind]}, and LMDeploy downloads from {_HUBS[hub]}: "
        note += "LMDEPLOY_USE_MODELSCOPE=True chooses ModelScope"
    revision = match["at"] or match["of"] or match["asked"]
    return Name(match["id"], revision, (note,) if note else ())


def near_by_name(path: str) -> str:
    """Return the end of a hint, with the preset that a path's last part names; "" without one."""
    word = path.rstrip("/").rpartition("/")[2].partition(":")[0]
    preset = find_preset(word) or _split_name(word)[0]
    return f"; by its name it is the preset {preset}: turbofit plan {preset}" if preset else ""


def names_a_model(word: str) -> bool:
    """Return whether a word is a preset's name, or has the form of a hub id or an address."""
    name = word
    with suppress(UsageError):
        name = read_name(word).text
    return bool(HUB_ID.fullmatch(name) or find_preset(name) or _split_name(name)[0])


def _checkpoints_hint(preset: str | None) -> str:
    """Return a hint on the checkpoints of a preset that LMDeploy runs: in 16 bits, and in 4 bits.

    Without a preset, the hint is to name the safetensors checkpoint.
    """
    if preset is None:
        return "name the safetensors checkpoint that it was made of"
    known = load_preset(preset)
    packed = four_bits(preset)
    four = f", and {packed} is in 4 bits" if packed else "; none in 4 bits is known"
    return f"{preset} is the checkpoint {known.hub_id} in 16 bits{four}"


def _split_name(name: str, stored: str | None = None) -> tuple[str | None, list[JsonObject], str]:
    """Split a name into the 16-bit preset at its start, its known suffixes, and the rest.

    ``stored``: the given ``--model-format``, which decides what a suffix such as 4bit means.
    """
    owner, _, last = name.lower().rpartition("/")
    owner = owner if HUB_ID.fullmatch(name) else ""
    words = re.split(r"[-_. ]+", last)
    preset, end_of = next(_presets_at_start(last, words), (None, 0))
    rest, suffixes = "-".join(words[end_of:]), []
    # Without a preset the maker is unknown, so no suffix is left out because of the owner.
    by_maker = preset is None or load_preset(preset).hub_id.lower().startswith(f"{owner}/")
    for suffix in _data()["ends"]:
        # A row may hold for some owners only, or for one --model-format.
        owners = suffix.get("owners", [suffix.get("owner", owner)])
        if owner not in owners or suffix.get("format", stored) != stored:
            continue
        if suffix.get("of_owner") and owner and not by_maker:
            continue
        pattern = rf"(?:^|-)(?:{suffix['words']})(?=-|$)"
        if word := re.search(pattern, rest):
            why = suffix.get("why", "").format(word=word[0].strip("-"))
            suffixes.append({**suffix, "why": why} if why else suffix)
            rest = re.sub(pattern, "", rest)
    return preset, suffixes, rest.strip("-")


def _presets_at_start(last: str, words: list[str]) -> Iterator[tuple[str, int]]:
    """Yield the 16-bit presets that a name begins with, longest first, each with its end.

    The end is an index into ``words``. Presets of unsupported models are left out. A name may begin
    with its owner: Qwen_Qwen2.5-VL-7B.
    """
    for start in (0, 1) if "_" in last else (0,):
        for end in range(len(words), start, -1):
            key = find_preset("-".join(words[start:end]))
            preset = load_preset(key) if key and re.search(r"\db\b", key) else None
            if key and preset and preset.quantization is None and preset.unsupported is None:
                yield key, end


def unrunnable(name: str, stored: str | None = None) -> UsageError | None:
    """Return the error if the end of a name says that LMDeploy cannot run the model, else None.

    ``stored``: the given ``--model-format``, which decides what a suffix such as 4bit means.
    """
    preset, suffixes, _ = _split_name(name.replace(":", "-"), stored)
    suffix = next((suffix for suffix in suffixes if "why" in suffix), None)
    if suffix is None:
        return None
    last = name.rpartition("/")[2]
    what = f"LMDeploy {REFERENCE} does not run {last}: by its name it is {suffix['why']}"
    if suffix.get("owner") == "":  # this row is for folders: a folder that exists is read itself
        what = f"no folder {last} is here; by its name it is {suffix['why']}"
    return UsageError(what, hint=_checkpoints_hint(preset))


def by_its_name(
    hub_id: str, unread: str, *, guess: bool, model_format: str | None = None
) -> Model | str:
    """Return the model that a hub id suggests: the preset at its start, quantised as its end says.

    A warning of the model says that its shapes are assumed.

    Args:
        hub_id: a hub id without a preset.
        unread: the reason why the checkpoint was not read.
        guess: whether to assume a preset; False if the hub answered, but has no such model.
        model_format: the given ``--model-format``.

    Returns:
        The model; if none is assumed, the end of a hint about a similar preset, or an empty text.
    """
    preset, suffixes, rest = _split_name(hub_id, model_format)
    model = preset_model(preset) if preset else None
    # How the layers are stored, if a suffix of the name says so.
    runs = next((suffix["runs"] for suffix in suffixes if "runs" in suffix), None)
    of_another_shape = any(re.fullmatch(_data()["others"], word) for word in rest.split("-"))
    if not guess or model is None or of_another_shape or (runs and model.quantization):
        # A size in the rest of the name means another preset than the one at the start.
        nearest = nearest_names(hub_id)[:1] if sizes_of(rest) else []
        return f"; the preset {(*nearest, preset)[0]} has a similar name" if preset else ""
    warning = f"{unread}: its shapes are assumed to be those of the preset {preset}"
    if runs and runs["method"] == "gptq" and model.text.delta is not None:
        # TurboMind's support depends on the layers in 16 bits, which no name tells.
        return f"; {preset} has a similar name; its config.json says whether LMDeploy runs it"
    if runs:
        stored = msgspec.convert(runs, Quantization)
        model = _packed(model, stored)
        warning += (
            f", and its layers {stored.method} of {stored.bits} bits in groups of"
            f" {stored.group_size} (smaller groups, or layers left in 16 bits, need more)"
        )
    warning += f"; {rest!r} is read as the name of a fine-tune" if rest else ""
    source = msgspec.structs.replace(model.source, sizes="estimate")
    return msgspec.structs.replace(
        model, name=hub_id.rpartition("/")[2], hub_id=hub_id, source=source, warnings=(warning,)
    )


def _packed(model: Model, stored: Quantization) -> Model:
    """Return a 16-bit model as if its layers were quantised like ``stored``."""
    dtype = model.dtype if stored.method == "fp8" else "float16"
    size = stored_bytes(model.text, model.vision, dtype, stored)
    return msgspec.structs.replace(model, quantization=stored, dtype=dtype, weight_bytes=size)


@cache
def families() -> tuple[str, ...]:
    """Return the words with which names of models begin, such as ``qwen``.

    A line of a log without any of these words is not searched for names.
    """
    words = {match[0] for name in known_presets() if (match := re.match("[a-z]+", name))}
    return tuple(words | {"cogvlm", "llava", "llama"})


def names_in(text: str) -> Iterator[str]:
    """Yield the parts of a text that may be names of models.

    These parts are each path up to its last part with a number, such as ``Qwen2-VL-7B``, and each
    mention of CogVLM.
    """
    for token in _TOKEN.findall(text):
        parts = token.rstrip(".").split("/")
        while parts and not _NUMBERED.search(parts[-1]):
            parts.pop()
        if parts:
            yield "/".join(parts)
    yield from _COGVLM.findall(text)


@lru_cache(1024)
def preset_of(name: str) -> str | None:
    """Return the preset that a name or a folder's path in a log means, or None.

    ModelScope writes a dot in the name of a folder as three underscores.
    """
    name = name.replace("___", ".")
    plain = name.lower().replace("_", "-")
    for pattern, preset in _SPELLINGS:
        if re.search(pattern, plain):
            return preset
    return find_preset(name) or find_preset(name.rstrip("/").rpartition("/")[2])
