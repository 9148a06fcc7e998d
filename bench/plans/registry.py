"""Lists all architectures of LMDeploy's registries, with turbofit's answer to each."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from bench import page
from turbofit.core.model import Model
from turbofit.model.families.dims import refusal
from turbofit.model.families.engines import TURBOMIND_VISION, engine_problem
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES, TURBOMIND_TEXT
from turbofit.model.presets import known_presets, load_preset, preset_model

OUT = Path(__file__).with_name("REGISTRY.md")
ENGINES = {"turbomind": "TurboMind", "pytorch": "PyTorch engine", "transformers": "Transformers"}
PLANNED = TEXT_ARCHITECTURES | set(VISION_READERS)

HEAD = """# Every architecture that LMDeploy lists

`python -m bench.plans registry --write`, LMDeploy {version}: its three registries
(`turbomind/supported_models.py`, `pytorch/models/module_map.py`, `vl/model`) and the models that it
removed. *turbofit* is what `turbofit plan` answers: the engines that it plans in 16 bits, or its
refusal and hint. {planned} of {all} architectures are planned.

*Presets*: whether there are some; {lacking} architectures that are planned have none.

| architecture | TurboMind | PyTorch engine | images | presets | turbofit |
|---|---|---|---|---|---|
"""


class Listed(NamedTuple):
    """LMDeploy's registries: the architectures that each lists."""

    turbomind: frozenset[str]
    pytorch: frozenset[str]
    images: frozenset[str]
    removed: frozenset[str]


@cache
def listed() -> Listed:
    """Read the registries of the installed LMDeploy."""
    from lmdeploy.pytorch.models.module_map import MODULE_MAP, REMOVED_MODEL_MAP
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS
    from lmdeploy.vl.model import builder

    seen: set[str] = set()
    for front_end in builder.VISION_MODELS.module_dict.values():
        names = getattr(front_end, "_arch", None) or ()
        seen |= {names} if isinstance(names, str) else set(names)
    return Listed(
        frozenset(SUPPORTED_ARCHS),
        frozenset(MODULE_MAP),
        frozenset(seen),
        frozenset(REMOVED_MODEL_MAP),
    )


@cache
def _examples() -> dict[str, Model]:
    """Return a preset model in 16 bits for each architecture that has one."""
    found: dict[str, Model] = {}
    for preset_id in known_presets():
        preset = load_preset(preset_id)
        if preset.architecture and preset.unsupported is None and preset.quantization is None:
            found.setdefault(preset.architecture, preset_model(preset_id))
    return found


def answer(architecture: str) -> str:
    """Return what ``turbofit plan`` answers for a checkpoint of this architecture."""
    if architecture not in PLANNED:
        error = refusal(architecture)
        return f"{error.message}; {error.hint}"
    example = _examples().get(architecture)
    if example is not None:
        runs = [name for name in ENGINES if engine_problem(example, name) is None]
    else:
        native = architecture in TURBOMIND_TEXT | TURBOMIND_VISION
        runs = ["turbomind", "pytorch"] if native else ["pytorch"]
    return "plans " + ", ".join(ENGINES[name] for name in runs)


@cache
def _with_presets() -> set[str]:
    """Return the architectures that have a preset."""
    presets = map(load_preset, known_presets())
    return {
        preset.architecture for preset in presets if preset.architecture and not preset.unsupported
    }


def table() -> str:
    """Return the whole page."""
    lists = listed()
    names = sorted(set().union(*lists), key=lambda name: (name.lower(), name))
    rows = []
    for name in names:
        pytorch = "removed" if name in lists.removed else "yes" if name in lists.pytorch else ""
        marks = ("yes" if name in one else "" for one in (lists.turbomind, lists.images))
        turbomind, images = marks
        presets = "yes" if name in _with_presets() else ""
        rows.append(page.row((f"`{name}`", turbomind, pytorch, images, presets, answer(name))))
    planned = PLANNED & set(names)
    head = HEAD.format(
        version=version("lmdeploy"), planned=len(planned), all=len(names),
        lacking=len(planned - _with_presets()),
    )  # fmt: skip
    return head + "\n".join(rows) + "\n"
