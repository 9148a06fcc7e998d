"""What people type for a model beside a folder, a hub id and a preset, and what of it is known.

Addresses of hubs, ``ORG/NAME@REVISION``, Ollama's ``NAME:TAG`` and paths of Windows are read for
the model that they name; a hub id that no preset has is held against them by the end of its name.
``presets/families/names.yaml`` has the hosts, the names and the ends.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import unquote

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, Quantization
from turbofit.core.presets import load_yaml, preset_path
from turbofit.model.modelscope_cache import uses_modelscope
from turbofit.model.parameters import stored_bytes
from turbofit.model.presets import HUB_ID, find_preset, known_presets, load_preset, preset_model

if TYPE_CHECKING:
    from turbofit.core.json_types import JsonObject

__all__ = ["Name", "read_name", "relative", "sibling", "unrunnable"]

_OLLAMA: Final = re.compile(r"[A-Za-z0-9][\w.-]{1,95}(:[\w.-]{1,95})?")
#: How a tag says the bits of GGUF.
_GGUF: Final = re.compile(r"(?:iq|q)\d\w*|fp16|bf16|f16|f32|qat", re.IGNORECASE)
_WINDOWS: Final = re.compile(r"[A-Za-z]:[\\/]|[^/]*\\")
#: Schemes of hubs that name no host.
_SCHEMES: Final = {"hf": "hf", "ms": "modelscope", "modelscope": "modelscope", "ollama": "ollama"}
#: What stands before a revision in an address.
_REVISIONS: Final = ("tree", "blob", "resolve", "raw", "commit", "commits", "view")
#: Parts of an address before a model's, and those behind which there is none.
_BEFORE: Final = ("api", "v1", "models", "library")
_OF_NO_MODEL: Final = ("datasets", "spaces", "studios", "collections", "papers", "blog", "docs")


class Name(NamedTuple):
    """A folder, a hub id or a preset; its revision; what was assumed of what was typed."""

    text: str
    revision: str | None = None
    notes: tuple[str, ...] = ()


@cache
def _data() -> JsonObject:
    return load_yaml(preset_path("families", "names"))


def read_name(typed: str, revision: str | None = None) -> Name:
    """The folder, hub id or preset that is meant; what has none of the forms stays as it is.

    Args:
        typed: as it stands on the command line; no such path is there.
        revision: what --revision says.

    Raises:
        UsageError: it names no model, or one revision beside another.
    """
    found = _read(typed.strip(" \t\"'"))
    named = None if found.revision in ("", "main", "master") else found.revision
    if revision is not None and named not in {None, revision}:
        raise UsageError(
            f"{typed[:120]} names the revision {named}, and --revision {revision}",
            hint="leave one of the two out",
        )
    return found._replace(revision=revision or named)


def _read(text: str) -> Name:
    text = re.sub(r"^git@([^:/]+):", r"https://\1/", text)
    scheme, _, rest = text.rpartition("://")
    host, _, path = rest.partition("/")
    if scheme.lower() in _SCHEMES:
        return _address(rest, _SCHEMES[scheme.lower()], "")
    if kind := _hosts().get(host.rpartition("@")[2].lower()):
        return _address(path, kind, host)
    if scheme == "file":
        return Name(unquote(rest))
    if scheme:
        raise UsageError(
            f"{host or scheme} is no hub of models that is known",
            hint="name a folder or a hub id (ORG/NAME); for a mirror of the Hugging Face hub set "
            "HF_ENDPOINT to its address",
        )
    if _WINDOWS.match(text) and os.name != "nt":
        return _of_windows(text)
    hub_id, _, revision = text.rstrip("/").partition("@")
    if HUB_ID.fullmatch(hub_id):
        return Name(hub_id, revision)
    if HUB_ID.fullmatch(text.partition(":")[0]):
        return _address(text, "hf", "")
    plain = text.rstrip("/")
    if find_preset(plain):
        return Name(plain)
    return _of_ollama(text) if _OLLAMA.fullmatch(text) else Name(text)


def _hosts() -> dict[str, str]:
    """The kind of each host, with those that the environment names."""
    hosts = dict(_data()["hosts"])
    mirror, modelscope = os.environ.get("HF_ENDPOINT"), os.environ.get("MODELSCOPE_ENDPOINT")
    for address, kind in ((mirror, "hf"), (modelscope, "modelscope")):
        if address:
            hosts[address.rpartition("://")[2].partition("/")[0].lower()] = kind
    return hosts


def _address(path: str, kind: str, host: str) -> Name:
    """The model of an address: its path begins behind the host."""
    parts = [unquote(one) for one in re.split(r"[?#]", path)[0].split("/") if one]
    while parts and parts[0] in _BEFORE:
        parts.pop(0)
    if kind == "ollama":
        return _of_ollama("/".join(parts))
    owner, name, *rest = [*parts, "", ""]
    name, _, revision = name.removesuffix(".git").partition("@")
    name, _, tag = name.partition(":")
    if owner in _OF_NO_MODEL or not HUB_ID.fullmatch(f"{owner}/{name}"):
        raise UsageError(
            f"{host}/{path[:120]} is the address of no model",
            hint="name the model's page, or its hub id (ORG/NAME)",
        )
    if tag:  # llama.cpp and Ollama name files of GGUF so
        raise unrunnable(f"{owner}/{name}-{tag}") or UsageError(
            f"{owner}/{name}:{tag[:60]} has a tag, and a hub has revisions",
            hint=f"name {owner}/{name}, or {owner}/{name}@REVISION",
        )
    at = next((number for number, one in enumerate(rest) if one in _REVISIONS), None)
    if at is not None and not revision:  # refs/pr/5 is one
        revision = "/".join(rest[at + 1 :][: 3 if rest[at + 1] == "refs" else 1])
    if query := re.search(r"[?&](?:version|revision)=([^&#]+)", path, re.IGNORECASE):
        revision = revision or unquote(query[1])
    return Name(f"{owner}/{name}", revision, _other_hub(kind, host))


def _other_hub(kind: str, host: str) -> tuple[str, ...]:
    """What is said where the address is of another hub than the one that LMDeploy asks."""
    if (kind == "modelscope") != uses_modelscope():
        whose, other = "ModelScope's", "the Hugging Face hub"
        if kind == "hf":
            whose, other = "the Hugging Face hub's", "ModelScope"
        return (
            f"the address is {whose}, and LMDeploy downloads from {other}: "
            "LMDEPLOY_USE_MODELSCOPE=True, or none, says which",
        )
    if "mirror" in host and host not in os.environ.get("HF_ENDPOINT", ""):
        return (f"the address is a mirror's: HF_ENDPOINT=https://{host} downloads from it",)
    return ()


def _of_windows(text: str) -> Name:
    """The last part of a path of Windows, where it is a model's name."""
    last = re.split(r"[\\/]+", text.rstrip("\\/"))[-1]
    if find_preset(last) is None:
        raise UsageError(
            f"{text[:120]!r} is a path of Windows, and this is no Windows",
            hint="name the folder as it is called here; in WSL C:\\models is /mnt/c/models",
        )
    note = f"{text} is a path of Windows, which is not here: {last} was taken by its name"
    return Name(last, None, (note,))


def _of_ollama(text: str) -> Name:
    """The model that Ollama has under a name and a tag; a name that is not Ollama's stays."""
    from turbofit.model.families.support import named_refusal

    name, _, tag = text.lower().partition(":")
    words = tag.split("-") if tag else []
    bits = next((one for one in words if _GGUF.fullmatch(one)), "")
    size = "-".join(one for one in words if one not in (bits, *_data()["ollama_forms"]))
    sizes = _data()["ollama"].get(name, {})
    model = sizes.get(size or "latest") or find_preset(f"{name}-{size}" if size else name)
    if model is None and not tag:
        return Name(text)
    if model is None:
        begin = re.sub(r"\W|_", "", name)
        alike = (one for one in known_presets() if re.sub(r"\W", "", one).startswith(begin))
        near = list(dict.fromkeys((*sizes.values(), *alike)))
        raise named_refusal(name) or UsageError(
            f"no model is known as {text[:80]!r}",
            hint=f"by this name there are {', '.join(near[:8])}"
            if near
            else "Ollama's models are GGUF: name the hub id (ORG/NAME) of the checkpoint that it "
            "was made of",
        )
    known = load_preset(model) if find_preset(model) == model else None
    plain = f"Ollama's {text} is GGUF, which LMDeploy does not run"
    four = known.awq if known else None
    if four and re.match(r"i?q4|qat", bits):
        return Name(four, None, (f"{plain}: {four} is what has 4 bits here",))
    if bits and not re.search("16|32", bits):
        raise UsageError(plain, hint=_here(model))
    in_four = f"; {four} has 4 bits, as most of Ollama's have" if four and not bits else ""
    return Name(
        model, None, (f"{plain}: planned is {model}, the checkpoint that it was made of{in_four}",)
    )


def _here(preset: str | None) -> str:
    """What of a model LMDeploy runs."""
    if preset is None or find_preset(preset) != preset:
        return "name the safetensors checkpoint that it was made of"
    known = load_preset(preset)
    four = f", and {known.awq} its 4 bits" if known.awq else "; of 4 bits none is known here"
    return f"{preset} is the checkpoint {known.hub_id} in 16 bits{four}"


def relative(name: str) -> str | None:
    """The preset that the beginning of a name is, size included; None where there is none."""
    return _split(name)[0]


def _split(name: str) -> tuple[str | None, str]:
    """That preset, and the rest of the name in small letters."""
    last = name.rpartition("/")[2]
    for whole in (last, last.partition("_")[2]):  # some repeat the owner: Qwen_Qwen2.5-VL-7B
        words = re.split(r"[-_. ]+", whole.lower())
        for count in range(len(words), 0, -1):
            begin = "-".join(words[:count])
            preset = find_preset(begin) if re.search(r"\db\b", begin) else None
            if preset:
                return preset, "-".join(words[count:])
    return None, "-".join(re.split(r"[-_. ]+", last.lower()))


def _ends(hub_id: str) -> tuple[str | None, list[JsonObject], str]:
    """The preset that a name begins with, the ends that are known, and what else it says."""
    preset, rest = _split(hub_id)
    owner, named, _ = hub_id.lower().rpartition("/")
    published = not named or (
        preset is not None and load_preset(preset).hub_id.lower().startswith(f"{owner}/")
    )
    found = []
    for end in _data()["ends"]:
        pattern = rf"(?:^|-)(?:{end['words']})(?=-|$)"
        if re.search(pattern, rest) and (published or not end.get("of_owner")):
            found.append(end)
            rest = re.sub(pattern, "", rest)
    return preset, found, rest.strip("-")


def unrunnable(name: str) -> UsageError | None:
    """Why LMDeploy does not run what a name's end says; None where it says no such thing."""
    preset, ends, _ = _ends(name)
    why = next((end["why"] for end in ends if "why" in end), None)
    if why is None:
        return None
    what = f"LMDeploy 0.18 does not run {name.rpartition('/')[2]}: by its name it is {why}"
    return UsageError(what, hint=_here(preset))


def sibling(hub_id: str, unread: str) -> Model | None:
    """A hub id as the preset that its name begins with, its weights as the end of the name says.

    All of it is assumed: the warning says what, and which way a checkpoint that differs goes.

    Args:
        hub_id: no preset has it.
        unread: why it was not read itself.
    """
    preset, ends, rest = _ends(hub_id)
    others = any(re.fullmatch(_data()["others"], word) for word in rest.split("-"))
    if preset is None or others or any("why" in end for end in ends):
        return None
    model = preset_model(preset)
    said = f"{unread}: its shapes are assumed to be those of the preset {preset}"
    if runs := next((end["runs"] for end in ends if "runs" in end), None):
        if model.quantization is not None:
            return None
        stored = msgspec.convert(runs, Quantization)
        dtype = model.dtype if stored.method == "fp8" else "float16"
        size = stored_bytes(model.text, model.vision, dtype, stored)
        model = msgspec.structs.replace(model, quantization=stored, dtype=dtype, weight_bytes=size)
        said += (
            f", and its layers {stored.method} of {stored.bits} bits in groups of"
            f" {stored.group_size} (smaller groups, or layers left in 16 bits, need more)"
        )
    if rest:
        said += f"; {rest!r} is taken for a fine-tune of it"
    return msgspec.structs.replace(
        model,
        name=hub_id.rpartition("/")[2],
        hub_id=hub_id,
        source=msgspec.structs.replace(model.source, sizes="estimate"),
        warnings=(said,),
    )
