"""Rows of public measurements: read in the shared format or in our own, written in our own.

A row's figures have names of ours: ``used_mib`` (whole GPU, a list where GPUs differ), ``blocks``,
``block_mib``, ``weights_gb`` and so on, in the units that the name ends in; a reporter's GB is read
as GiB, as nvidia-smi's MiB are commonly divided by 1024.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from turbofit.core.struct import Struct, to_builtins

__all__ = ["Row", "read_rows", "write_rows"]

#: Their key → our figure. Where a key has several meanings, `_own_figures` decides by the kind.
_FIGURES = {
    "used_mib_per_gpu": "used_mib",
    "used_mib": "used_mib",
    "gpu_used_gb": "used_gb",
    "gpu0_total_gb": "used_gb",
    "total_gb_min": "used_gb",
    "others_total_gb": "used_gb_last",
    "gpu1_used_gb": "used_gb",  # counted from one: the GPU with the tower
    "block_size_mb": "block_mib",
    "max_block_count": "blocks",
    "gpu_blocks": "blocks",
    "kv_tokens": "kv_tokens",
    "weights_gb": "weights_gb",
    "weights_gib": "weights_gb",
    "gpu0_weights_gb": "weights_gb",
    "weights_gb_per_gpu": "weights_gb",
    "others_weights_gb": "weights_gb_last",
    "llm_per_gpu_gb": "llm_gb",
    "vision_gb": "vision_gb",
    "vit_gb": "vision_gb",
    "vision_gb_expected": "vision_gb",
    "kv_gb": "cache_gb",
    "kv_gib": "cache_gb",
    "kv_per_gpu_gb": "cache_gb",
    "kv_mb": "cache_mib",
    "cache_budget_mib": "cache_mib",
    "free_at_cache_mib": "free_mib",
    "max_cached_tokens": "kv_tokens",
    "files_gb": "files_gb",
}
#: Their key → our figure, where a GB is 10^9 bytes: rows whose kind says so.
_DECIMAL = {
    "gpu_after_load_gb": "used_mib",
    "gpu_peak_gb": "peak_mib",
    "host_rss_load_peak_gb": "host_mib",
}
_RAN = {"ok", "figure", "ci_expected_ok"}


class Row(Struct):
    """One measurement: what was run, on what, and what was seen.

    ``free_mib`` was free when the cache was sized, where a log said so: the account then begins
    there (``turbofit predict --free-at-cache``). ``quant`` is ``awq``, ``gptq`` or ``fp8`` for
    weights, ``kv8`` or ``kv4``, both joined by a plus, or "". ``date`` may end at the month or the
    year; ``version`` is "" where none is stated. ``outcome`` is ``ran``, ``oom``, ``other`` (it
    failed, not for memory) or "".
    """

    id: str
    source: str
    date: str = ""
    engine: str = ""
    version: str = ""
    model: str = ""
    gpu: str = ""
    total_mib: int | None = None
    gpus: int = 1
    tp: int = 1
    quant: str = ""
    settings: dict[str, float] = msgspec.field(default_factory=dict)
    images: int | None = None
    tiles: int | None = None
    size: tuple[int, int] | None = None
    free_mib: float | None = None
    figures: dict[str, float | list[float]] = msgspec.field(default_factory=dict)
    outcome: str = ""
    phase: str = ""


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, in either format.

    Raises:
        ValueError: a line is neither.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            rows.append(msgspec.convert(data if "figures" in data else _theirs(data), Row))
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"{path.name}:{number}: not a row: {exc}") from None
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows in our own format, one a line, empty fields left out."""
    lines = []
    for row in rows:
        data = {k: v for k, v in to_builtins(row).items() if v not in (None, "", {}, [])}
        data.setdefault("figures", {})
        lines.append(json.dumps(data, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n")


def _theirs(data: dict[str, Any]) -> dict[str, Any]:
    """A row of the shared format, in ours."""
    observed = data["observed"]
    gpus = data.get("gpus") or [{}]
    count = data.get("n_gpus") or 1
    given = {
        "cache_max_entry_count": data.get("cache_max_entry_count"),
        "session_len": data.get("session_len"),
        "max_batch_size": data.get("max_batch_size"),
        "max_prefill_token_num": data.get("max_prefill"),
        "max_context_token_num": _context(data.get("other_flags") or ""),
    }
    figures = _given_figures(observed)
    return {
        "id": data["id"],
        "source": _bare(data["source"]),
        "date": _date(data.get("date") or ""),
        "engine": data.get("engine") or "",
        "version": _version(data.get("engine_version") or ""),
        "model": _bare(data.get("model") or ""),
        "gpu": gpus[0].get("name") or "",
        "total_mib": gpus[0].get("total_mib"),
        "gpus": count,
        "tp": data.get("tp") or 1,
        "quant": _quant(
            f"{data.get('quant') or ''} {data.get('model') or ''}", data.get("other_flags") or ""
        ),
        "settings": {k: v for k, v in given.items() if v is not None},
        "images": data.get("images_per_request"),
        "tiles": data.get("max_dynamic_patch"),
        "size": _size(data.get("other_flags") or ""),
        "free_mib": observed.get("free_at_kv_mb_derived"),
        "figures": figures,
        "outcome": _outcome(observed, figures),
        "phase": _phase(observed.get("phase") or ""),
    }


def _bare(text: str) -> str:
    """A name without what stands in brackets."""
    return re.sub(r"\s*\(.*?\)", "", text).strip()


def _version(text: str) -> str:
    """The first version of a text; "1.0" was never one of LMDeploy's."""
    match = re.search(r"0\.\d+(?:\.\d+)?(?:\.post\d+)?", text)
    return match[0] if match else ""


def _date(text: str) -> str:
    match = re.match(r"\d{4}(?:-\d{2}){0,2}", text)
    return match[0] if match else ""


def _quant(text: str, flags: str) -> str:
    """Packed weights, and quantised keys and values; the flags say of these alone."""
    lower = text.lower()
    kv = re.search(r"kv[ _]?int(4|8)|int(4|8) kv", lower)
    kv = kv or re.search(r"quant[-_]policy[ =](4|8)()", flags)
    weights = re.sub(r"kv[ _]?int\d|int\d kv", "", lower)
    packed = re.search(r"gptq|fp8|awq|w4a16|4-?bit|int4", weights)
    method = packed[0] if packed else ""
    if packed and method not in ("gptq", "fp8"):
        method = "awq"
    return "+".join(filter(None, (method, f"kv{kv[1] or kv[2]}" if kv else "")))


def _context(flags: str) -> int | None:
    """``max_context_token_num``, where the flags say it: small numbers count sessions."""
    match = re.search(r"max_context_token_num (\d+)", flags)
    return int(match[1]) if match else None


def _size(flags: str) -> tuple[int, int] | None:
    """Pixels of the images, where the flags say them."""
    match = re.search(r"\bimages? (\d{2,5})x(\d{2,5})", flags)
    return (int(match[1]), int(match[2])) if match else None


def _given_figures(observed: dict[str, Any]) -> dict[str, float | list[float]]:
    figures: dict[str, float | list[float]] = {}
    kind = observed.get("kind") or ""
    for key, name in _FIGURES.items():
        if _is_figure(observed.get(key)):
            figures[name] = observed[key]
    if "decimal" in kind:
        figures.update(
            {
                name: round(observed[key] * 1e9 / 2**20, 1)
                for key, name in _DECIMAL.items()
                if _is_figure(observed.get(key))
            }
        )
    figures.update(_host_figures(observed))
    if _is_figure(observed.get("slab_object_bytes")):
        figures["block_mib"] = observed["slab_object_bytes"] / 2**20
    if _is_figure(observed.get("gb")) and kind.startswith("gpu_memory"):
        figures["used_gb"] = observed["gb"]
    if "llm_gpu_mib" in observed:  # the GPU without a tower
        figures["used_mib_last"] = observed["llm_gpu_mib"]
    if "llm_gb" in observed and "llm_gb" not in figures and "llm_per_gpu_gb" not in observed:
        figures["llm_gb"] = observed["llm_gb"]
    if kind == "maintainer_budget":  # said before anybody measured
        return {name.replace("used", "budget"): value for name, value in figures.items()}
    return figures


def _host_figures(observed: dict[str, Any]) -> dict[str, float | list[float]]:
    """Host memory: what the server added, and what of it is shared, as pinned memory is counted."""
    figures: dict[str, float | list[float]] = {}
    before, after = observed.get("host_used_before_gib"), observed.get("host_used_after_gib")
    if _is_figure(before) and _is_figure(after):
        figures["host_mib"] = (after - before) * 1024
    for key, value in observed.items():  # the whole machine's, so the system is in it
        share = re.fullmatch(r"host_percent_of_(\d+)gib", key)
        if share and "host_mib" not in figures:
            figures["host_mib"] = round(value / 100 * int(share[1]) * 1024)
    if _is_figure(observed.get("host_shared_after_gib")):
        figures["pinned_mib"] = observed["host_shared_after_gib"] * 1024
    return figures


def _is_figure(value: Any) -> bool:
    """Whether it is a number, or a list of them."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)


def _outcome(observed: dict[str, Any], figures: dict[str, Any]) -> str:
    said = observed.get("outcome") or ""
    if said == "oom":
        return "oom"
    if said == "figure" and not figures:
        return ""
    if said in _RAN:
        return "ran"
    return "other" if said else ""


def _phase(text: str) -> str:
    """The phase in a word of ours."""
    lower = text.lower()
    if re.search(r"weight|load|convert|startup|create", lower):
        return "load" if not lower.startswith("startup") else "start"
    return "request" if re.search(r"request|forward|image|vision", lower) else ""
