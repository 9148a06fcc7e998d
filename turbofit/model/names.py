"""What people type for a model beside a folder, a hub id and a preset, and what of it is known.

Addresses of hubs, ``ORG/NAME@REVISION``, Ollama's ``NAME:TAG`` and paths of Windows are read for
the model that they name; a hub id that no preset has is held against them by the end of its name.
``presets/families/names.yaml`` has the hosts, the names and the ends.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, Quantization
from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.model.modelscope_cache import uses_modelscope
from turbofit.model.parameters import stored_bytes
from turbofit.model.presets import (
    HUB_ID,
    find_preset,
    known_presets,
    load_preset,
    nearest_names,
    preset_model,
)

__all__ = ["Name", "read_name", "relative", "sibling", "unrunnable"]

_OLLAMA: Final = re.compile(r"[A-Za-z0-9][\w.-]{1,95}(:[\w.-]{1,95})?")
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]{1,20})://", re.IGNORECASE)
#: How a tag or a file of GGUF says its bits.
_GGUF: Final = re.compile(r"(?:iq|q)(\d)(?:_\w+)?|(?:fp|bf|f)(16|32)|qat", re.IGNORECASE)
_WINDOWS: Final = re.compile(r"[A-Za-z]:[\\/]|[^/]*\\")
#: Schemes of hubs that name no host.
_SCHEMES: Final = {"hf": "hf", "ms": "modelscope", "modelscope": "modelscope", "ollama": "ollama"}
#: What stands before a revision in an address of a hub; ModelScope's pages of files have two words.
_REVISIONS: Final = ("tree", "blob", "resolve", "raw", "commit", "commits", "view")
_BRANCHES: Final = ("main", "master")
#: The first parts of addresses of a hub that are no model's.
_NO_MODELS: Final = (
    "datasets", "spaces", "studios", "collections", "papers", "blog", "docs", "learn", "search",
)  # fmt: skip


class Name(NamedTuple):
    """A folder, a hub id or a preset; its revision; what was assumed of what was typed."""

    text: str
    revision: str | None = None
    notes: tuple[str, ...] = ()


class _End(Struct, forbid_unknown_fields=True):
    """The end of a name: see the file."""

    words: str
    runs: Quantization | None = None
    of_owner: bool = False
    why: str = ""
    same: bool = False


class _Data(Struct, forbid_unknown_fields=True):
    schema: str
    hosts: dict[str, str]
    ollama: dict[str, dict[str, str]]
    ollama_forms: tuple[str, ...]
    ends: tuple[_End, ...]
    others: str


@cache
def _data() -> _Data:
    path = preset_path("families", "names")
    return converted(load_yaml(path), _Data, path)


def read_name(typed: str, revision: str | None = None) -> Name:
    """The folder, hub id or preset that is meant; what is none of the forms stays as it is.

    Args:
        typed: as it stands on the command line; no such path is there.
        revision: what --revision says.

    Raises:
        UsageError: it names no model, or one revision beside another.
    """
    found = _read(typed.strip())
    if found.revision in _BRANCHES:
        found = found._replace(revision=None)
    if revision is not None and found.revision not in {None, revision}:
        raise UsageError(
            f"{typed[:120]} names the revision {found.revision}, and --revision {revision}",
            hint="leave one of the two out",
        )
    return found._replace(revision=revision or found.revision)


def _read(text: str) -> Name:
    text = re.sub(r"^git@([^:/]+):", r"https://\1/", text)
    scheme = _SCHEME.match(text)
    host = _host(text if scheme else f"//{text}")
    if scheme and scheme[1].lower() == "file":
        return Name(unquote(text[scheme.end() :]))
    if scheme and (kind := _SCHEMES.get(scheme[1].lower())):
        return _address(text, text[scheme.end() :], kind, "")
    if kind := _hosts().get(host):
        return _address(text, text[scheme.end() if scheme else 0 :].partition("/")[2], kind, host)
    if scheme:
        raise UsageError(
            f"{host or scheme[0]} is no hub of models that is known",
            hint="name a folder or a hub id (ORG/NAME); for a mirror of the Hugging Face hub set "
            "HF_ENDPOINT to its address",
        )
    if _WINDOWS.match(text) and os.name != "nt":
        return _of_windows(text)
    hub_id, _, revision = text.rstrip("/").partition("@")
    if HUB_ID.fullmatch(hub_id):
        return Name(hub_id, revision or None)
    hub_id, _, tag = text.partition(":")
    if HUB_ID.fullmatch(hub_id):
        raise _tagged(hub_id, tag)
    if find_preset(text) is None and _OLLAMA.fullmatch(text):
        return _of_ollama(text)
    return Name(text.rstrip("/") if find_preset(text.rstrip("/")) else text)


def _hosts() -> dict[str, str]:
    """The kind of each host, with those that the environment names."""
    mirrors = (("HF_ENDPOINT", "hf"), ("MODELSCOPE_ENDPOINT", "modelscope"))
    named = {_host(os.environ.get(key, "")): kind for key, kind in mirrors}
    return {**_data().hosts, **{host: kind for host, kind in named.items() if host}}


def _host(address: str) -> str:
    """The host and port of an address; empty where it has none."""
    try:
        return urlsplit(address).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def _address(typed: str, path: str, kind: str, host: str) -> Name:
    """The model of an address: its path begins behind the host."""
    parts = [unquote(one) for one in re.split(r"[?#]", path)[0].split("/") if one]
    if kind == "ollama":
        return _of_ollama("/".join(one for one in parts if one != "library"))
    while parts and parts[0] in ("api", "v1", "models"):
        parts.pop(0)
    owner, name, *rest = [*parts, "", ""]
    name, _, revision = name.removesuffix(".git").partition("@")
    name, _, tag = name.partition(":")
    if owner in _NO_MODELS or not HUB_ID.fullmatch(f"{owner}/{name}"):
        raise UsageError(
            f"{typed[:120]} is the address of no model",
            hint="name the model's page, or its hub id (ORG/NAME)",
        )
    at = next((number for number, one in enumerate(rest) if one in _REVISIONS), None)
    if at is not None and not revision:
        behind = rest[at + 1 :]
        # refs/pr/5 is one revision.
        revision = "/".join(behind[: 3 if behind[:1] == ["refs"] else 1])
    if kind == "modelscope" and (query := re.search(r"[?&](?:version|revision)=([^&#]+)", path, 2)):
        revision = revision or unquote(query[1])
    if tag:
        raise _tagged(f"{owner}/{name}", tag)
    return Name(f"{owner}/{name}", revision or None, _other_hub(kind, host))


def _other_hub(kind: str, host: str) -> tuple[str, ...]:
    """What is said where the address is of another hub than the one that LMDeploy asks."""
    if kind == "modelscope" and not uses_modelscope():
        return (
            "the address is ModelScope's, and LMDeploy downloads from the Hugging Face hub: "
            "LMDEPLOY_USE_MODELSCOPE=True makes it ask ModelScope",
        )
    if kind == "hf" and uses_modelscope():
        return (
            "the address is the Hugging Face hub's, and LMDEPLOY_USE_MODELSCOPE makes LMDeploy "
            "download from ModelScope",
        )
    if "mirror" in host and host not in os.environ.get("HF_ENDPOINT", ""):
        return (f"the address is a mirror's: HF_ENDPOINT=https://{host} downloads from it",)
    return ()


def _of_windows(text: str) -> Name:
    """The last part of a path of Windows, where it is a model's name.

    Raises:
        UsageError: it is none.
    """
    last = re.split(r"[\\/]+", text.rstrip("\\/"))[-1]
    if find_preset(last) is None:
        raise UsageError(
            f"{text[:120]!r} is a path of Windows, and this is no Windows",
            hint="name the folder as it is called here; in WSL C:\\models is /mnt/c/models",
        )
    note = f"{text} is a path of Windows, which is not here: {last} was taken by its name"
    return Name(last, None, (note,))


def _of_ollama(text: str) -> Name:
    """The model that Ollama has under a name and a tag; a name that is not Ollama's stays.

    Raises:
        UsageError: of this size, or of these bits, there is none here.
    """
    name, _, tag = text.lower().partition(":")
    table = _data().ollama.get(name, {})
    words = tag.split("-") if tag else []
    bits = next((one for one in words if _GGUF.fullmatch(one)), "")
    size = "-".join(one for one in words if one != bits and one not in _data().ollama_forms)
    model = table.get(size or "latest") or find_preset(f"{name}-{size}" if size else name)
    if model is None and not tag:
        return Name(text)
    if model is None:
        raise _no_such_size(text, name)
    preset = find_preset(model)
    packed = load_preset(preset).awq if preset else None
    plain = f"Ollama's {text} is GGUF, which LMDeploy does not run"
    four = re.match(r"i?q4|qat", bits, re.IGNORECASE)
    if four and packed:
        return Name(packed, None, (f"{plain}: {packed} is what has 4 bits here",))
    if bits and not re.search("16|32", bits):
        raise _no_gguf(model, bits)
    in_four = f"; {packed} has 4 bits, as most of Ollama's have" if packed and not bits else ""
    stored = "the checkpoint that it was made of"
    return Name(model, None, (f"{plain}: planned is {model}, {stored}{in_four}",))


def _no_such_size(text: str, name: str) -> UsageError:
    """No preset is of this name and size."""
    from turbofit.model.families.support import named_refusal

    plain = re.sub(r"[^a-z0-9]", "", name)
    near = [one for one in known_presets() if re.sub(r"[^a-z0-9]", "", one).startswith(plain)]
    near = [one for one in near if not one.endswith("-awq")] or nearest_names(name)
    hint = (
        f"by this name there are {', '.join(near[:6])}"
        if near
        else "Ollama's models are GGUF: name the hub id (ORG/NAME) of the checkpoint that it was "
        "made of"
    )
    return named_refusal(name) or UsageError(f"no model is known as {text[:80]!r}", hint=hint)


def _tagged(hub_id: str, tag: str) -> UsageError:
    """A tag behind a hub id: llama.cpp and Ollama name files of GGUF so, the hub has revisions."""
    if _GGUF.fullmatch(tag):
        return _no_gguf(hub_id, tag)
    return unrunnable(hub_id) or UsageError(
        f"{hub_id}:{tag[:60]} has a tag, and a hub has revisions",
        hint=f"name {hub_id}, or {hub_id}@REVISION",
    )


def _no_gguf(name: str, what: str) -> UsageError:
    """GGUF of so many bits was asked for."""
    return UsageError(
        f"{what} is GGUF, which LMDeploy does not run", hint=_here(relative(name) or name)
    )


def _here(preset: str) -> str:
    """What of a model LMDeploy runs."""
    if find_preset(preset) != preset:
        return f"name the safetensors checkpoint that {preset} was made of"
    known = load_preset(preset)
    four = f", and {known.awq} its 4 bits" if known.awq else "; of 4 bits none is known here"
    bits = "" if known.quantization else " in 16 bits"
    return f"{preset} is the checkpoint {known.hub_id}{bits}{four}"


def _split(name: str) -> tuple[str | None, str]:
    """The preset that the beginning of a name is, and the rest of it."""
    last = name.rpartition("/")[2]
    for whole in (last, last.partition("_")[2]):  # some repeat the owner: Qwen_Qwen2.5-VL-7B
        words = re.split(r"[-_. ]+", whole)
        for count in range(len(words), 0, -1):
            begin = "-".join(words[:count])
            preset = find_preset(begin) if re.search(r"\d+b(?![a-z])", begin.lower()) else None
            if preset:
                return preset, "-".join(words[count:]).lower()
    return None, ""


def relative(name: str) -> str | None:
    """The preset that the beginning of a name is, size included; None where there is none."""
    return _split(name)[0]


def _ends(hub_id: str) -> tuple[str | None, list[_End], str]:
    """The preset that a name begins with, the ends that are known, and what else it says."""
    preset, rest = _split(hub_id)
    if preset is None:
        rest = "-".join(re.split(r"[-_. ]+", hub_id.lower()))
    published = preset is not None and _owner(hub_id) == _owner(load_preset(preset).hub_id)
    found = []
    for end in _data().ends:
        pattern = rf"(?:^|-)(?:{end.words})(?=-|$)"
        if (published or not end.of_owner) and re.search(pattern, rest):
            found.append(end)
            rest = re.sub(pattern, "", rest)
    return preset, found, rest.strip("-")


def _owner(hub_id: str) -> str:
    return hub_id.partition("/")[0].lower()


def unrunnable(name: str) -> UsageError | None:
    """Why LMDeploy does not run what a name's end says; None where it says no such thing."""
    preset, ends, _ = _ends(name)
    why = next((end.why for end in ends if end.why), None)
    if why is None:
        return None
    return UsageError(
        f"LMDeploy 0.18 does not run {name.rpartition('/')[2]}: by its name it is {why}",
        hint=_here(preset) if preset else "name the safetensors checkpoint that it was made of",
    )


def sibling(hub_id: str, unread: str) -> Model | None:
    """A hub id as the preset that its name begins with, its weights as the end of the name says.

    All of it is assumed: the warning says what, and which way a checkpoint that differs goes.

    Args:
        hub_id: no preset has it.
        unread: why it was not read itself.
    """
    preset, ends, rest = _ends(hub_id)
    if preset is None or any(end.why for end in ends):
        return None
    if any(re.fullmatch(_data().others, word) for word in rest.split("-")):
        return None
    model = preset_model(preset)
    stored = next((end.runs for end in ends if end.runs), None)
    said = f"{unread}: its shapes are assumed to be those of the preset {preset}"
    if stored is not None:
        if model.quantization is not None:
            return None
        dtype = model.dtype if stored.method == "fp8" else "float16"
        size = stored_bytes(model.text, model.vision, dtype, stored)
        model = replace(model, quantization=stored, dtype=dtype, weight_bytes=size)
        said += (
            f", and its layers {stored.method} of {stored.bits} bits in groups of"
            f" {stored.group_size} (smaller groups, or layers left in 16 bits, need more)"
        )
    if rest:
        said += f"; {rest!r} is taken for a fine-tune of it"
    return replace(
        model,
        name=hub_id.rpartition("/")[2],
        hub_id=hub_id,
        source=replace(model.source, sizes="estimate"),
        warnings=(said,),
    )
