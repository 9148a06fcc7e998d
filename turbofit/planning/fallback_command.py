"""The planned device map, and the command line of turbofit's server for Transformers."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.plan import Plan

#: What is run, with ``python -m``.
MODULE: Final = "turbofit.launch.fallback.server"
#: Torch grows its segments in place: without it the cache, which grows by a token at a time, and
#: the loader leave holes.
ENVIRONMENT: Final = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def arguments(plan: Plan, path: str, host: str, port: int) -> tuple[str, ...]:
    """The words; the first is ``turbofit-fallback``: who runs it puts ``python -m`` and `MODULE`.

    Raises:
        UsageError: the plan has no device map.
    """
    if plan.device_map is None:
        raise UsageError(
            "the plan has no device map, without which the fallback engine loads nothing",
            hint="plan with --engine transformers",
        )
    model, settings = plan.model, plan.settings
    return (
        "turbofit-fallback",
        "--model", path,
        "--served-name", model.hub_id or model.name,
        "--device-map", folded(plan.device_map),
        "--dtype", settings.dtype,
        "--session-len", str(settings.session_len),
        "--max-images", str(plan.limits.most_images(model.image_rule)),
        "--host", host,
        "--port", str(port),
    )  # fmt: skip


_LAYER: Final = re.compile(r"(.+\.layers)\.(\d+)")
_RUN: Final = re.compile(r"(.+\.layers)\.(\d{1,9})-(\d{1,9})")
#: More layers than any model has: beyond it a run is a typing error.
_MOST_LAYERS: Final = 10_000


def folded(placed: Mapping[str, int | str]) -> str:
    """The map as JSON, ``model.layers.0-15`` for layers that lie side by side on one device."""
    made: dict[str, int | str] = {}
    entries = [(_LAYER.fullmatch(name), name, where) for name, where in placed.items()]
    for (is_layer, where), run in groupby(entries, key=lambda one: (one[0] is not None, one[2])):
        found = list(run)
        first, last = found[0][0], found[-1][0]
        if is_layer and first and last and len(found) > 1:
            made[f"{first[1]}.{first[2]}-{last[2]}"] = where
        else:
            made.update({name: where for _, name, _ in found})
    return json.dumps(made, separators=(",", ":"))


def read_map(text: str) -> dict[str, int | str]:
    """The map of a JSON text, or of a file that holds one.

    Raises:
        UsageError: it is none.
    """
    try:
        given = text if text.lstrip().startswith("{") else Path(text).read_text("utf-8")
        data = msgspec.json.decode(given)
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as exc:
        raise UsageError(
            f"the device map cannot be read: {exc}", hint="give JSON, or a file that holds it"
        ) from None
    if not isinstance(data, dict) or not all(
        isinstance(where, int) or where in ("cpu", "disk") for where in data.values()
    ):
        raise UsageError(
            "the device map is no object of modules and devices",
            hint='write it as {"model.embed_tokens": 0, "model.layers.0-15": 0, ...}',
        )
    made: dict[str, int | str] = {}
    for name, where in data.items():
        match = _RUN.fullmatch(name)
        if match is None:
            made[name] = where
            continue
        first, last = int(match[2]), int(match[3])
        if not first <= last < _MOST_LAYERS:
            raise UsageError(
                f"the device map has a run of layers from {first} to {last}",
                hint="write a run as model.layers.0-15, the first layer first",
            )
        made.update({f"{match[1]}.{number}": where for number in range(first, last + 1)})
    return made
