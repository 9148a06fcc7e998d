"""What a torch engine did on pretend GPUs: the end, each card, the cases, the death."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turbofit.core.json_types import Document
from turbofit.core.units import format_bytes, mib
from turbofit.rehearse.torch.torch_drivers import DRIVERS
from turbofit.report.painters.document import (
    Block,
    Column,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
)

__all__ = ["torch_view"]

#: Parts of a card's start, and what they are called.
_PARTS = (
    ("weights", "weights"),
    ("cache", "KV cache"),
    ("warm-up", "CUDA graphs and warm-up"),
    ("after_start", "after start"),
)


def torch_view(document: Document) -> Iterator[Block]:
    """The document of `rehearse.torch.torch_report`, for people."""
    versions = document["versions"]
    driver = DRIVERS[document["engine"]]
    named = f"{driver.title} {versions.get(driver.package, '')}".strip()
    yield Heading(text=f"{document['model']['name']} with {named} on pretend GPUs")
    served = document["outcome"] == "served"
    yield Paragraph(
        text=f"{document['outcome']} in {document['seconds']:.1f} s with torch "
        f"{versions.get('torch', '?')}: memory is the engine's own, values and speed are not real",
        tone="good" if served else "bad",
    )
    yield from _death(document["death"], refused=document["outcome"] == "refused")
    yield from _settings(document)
    for card in document["gpus"]:
        yield from _card(card)
    if document["cases"]:
        yield from _cases(document)
    yield Paragraph(text="not known to it:", tone="dim")
    yield Items(items=tuple(document["not_known"]), tone="dim")


def _death(death: Mapping[str, Any] | None, *, refused: bool) -> Iterator[Block]:
    if death is None:
        return
    text = f"it {'refused' if refused else 'ended in'} {death['phase']}"
    if death["asked"] is not None:
        text += (
            f" on GPU {death['gpu']}: {format_bytes(death['asked'])} asked, "
            f"{format_bytes(death['left'])} left"
        )
    yield Paragraph(text=text, tone="bad")
    facts = [("said", death["message"])]
    if death["pid"] is not None:
        facts.append(("process", f"{death['pid']} {death['command'][:60]}"))
    if death["where"]:
        facts.append(("where", " < ".join(death["where"])))
    after = death["afterwards"]
    if after:
        facts.append(("next request", f"{after['next_request']} {after['words']}".strip()))
        facts.append(("engine's own health", str(after["health"])))
    yield FactList(facts=tuple(facts))
    if after and after["next_request"] != "finished":
        yield Paragraph(
            text="the process lives on and serves nobody: over HTTP LMDeploy 0.18 answers every "
            "further request with 503, and its /health was still 200 when that was measured",
            tone="bad",
        )


def _settings(document: Mapping[str, Any]) -> Iterator[Block]:
    given = document["given"]
    options = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
    facts = [("given", options)]
    if DRIVERS[document["engine"]].batches:
        facts.append(("all else", "LMDeploy's own defaults"))
    else:
        added = {k: v for k, v in document["settings"].items() if k not in given}
        facts.append(("as the fallback", ", ".join(f"{k}={v}" for k, v in added.items())))
    for name, value in document["environment"].items():
        facts.append((name, value))
    if document["device_map"]:
        facts.append(("devices", ", ".join(sorted(set(document["device_map"].values())))))
    image = document["worst_image"]
    if image:
        tokens = f", {image['tokens']} tokens" if image["tokens"] is not None else ""
        facts.append(("worst image", f"{image['width']}x{image['height']}{tokens}"))
    cache = document["cache"]
    if cache and cache["free"]:
        facts += [
            ("free at sizing", " ".join(mib(free) for free in cache["free"]) + " MiB"),
            (
                "cache",
                f"{cache['num_gpu_blocks']} blocks of {cache['block_size']} tokens: "
                f"{cache['tokens']:,} tokens at ratio {cache['cache_max_entry_count']}",
            ),
            ("max_prefill_token_num", str(cache["max_prefill_token_num"])),
            ("max_batch_size", str(cache["max_batches"])),
        ]
    yield FactList(facts=tuple(facts))


def _card(card: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(text=f"GPU {card['gpu']}: {card['name']}, {mib(card['total'])} MiB")
    count = len(card["processes"])
    rows: list[tuple[str, ...]] = [
        ("used by others", "", "", mib(card["used_by_others"])),
        (f"CUDA contexts, {count} in all", "", "", mib(card["contexts"])),
    ]
    for key, title in _PARTS:
        if key in card:
            part = card[key]
            rows.append((title, *(_mib(part[k]) for k in ("allocated", "reserved", "held"))))
    rows.append(("most, contexts included", "", "", mib(card["peak"])))
    rows.append(("left then", "", "", mib(card["left_at_peak"])))
    columns = ("", "allocated", "reserved", "of the card")
    yield Table(
        columns=tuple(Column(title=title, right=bool(title)) for title in columns),
        rows=tuple(rows),
    )


def _cases(document: Mapping[str, Any]) -> Iterator[Block]:
    rows = []
    for case in document["cases"]:
        for row in case["gpus"]:
            statuses = " ".join(f"{count} {name}" for name, count in case["statuses"].items())
            rows.append(
                (
                    case["name"],
                    str(case.get("prompt_tokens") or ""),
                    str(row["gpu"]),
                    _mib(row["allocated_peak"]),
                    _mib(row["reserved_peak"]),
                    _mib(row["fragmentation"]),
                    mib(row["left"]),
                    _mib(row["margin"]),
                    statuses or "died",
                )
            )
    titles = ("case", "tokens", "GPU", "allocated", "reserved", "idle", "left", "margin", "ended")
    text = ("case", "ended")
    yield Heading(text="Cases at their peaks (MiB)")
    yield Table(
        columns=tuple(Column(title=t, right=t not in text, wrap=t in text) for t in titles),
        rows=tuple(rows),
    )
    decides = f"{document['decides']} decides; " if document["decides"] else ""
    yield Paragraph(
        text=f"{decides}torch keeps what it has reserved, so left falls from case to case; idle is "
        "reserved and not in use, margin is left + idle: left is certain, idle needs luck",
        tone="dim",
    )


def _mib(value: int | None) -> str:
    return "" if value is None else mib(value)
