"""The constants of the speed forecast that kept results imply, and the forecast beside them.

A decode step reads the weights and all keys and values at ``memory_efficiency`` of the card's
bandwidth, and launches every layer (``layer_seconds``) and itself (``step_seconds``); a prefill
computes at ``compute_efficiency``, a vision tower at ``vision_efficiency``. Steps of a small and of
a large model tell the first two apart; the third cannot be told from the second by any of them, and
stays as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.gpu.implied import Reading
from bench.gpu.results import Results
from turbofit import api
from turbofit.core.machine import Gpu
from turbofit.core.plan import Plan
from turbofit.memory.engines import engine_named
from turbofit.model.source import resolve_model
from turbofit.planning.speed import GpuRates, StepWork, rates, work_of

_PRESET = "engines/throughput.yaml"
#: By how much of itself a constant of speed must be off before it changes.
_SHARE = 0.1
#: Width and height of the images that were sent, and tokens of one pass of a prefill.
IMAGE, PREFILL = (1792, 1344), 8192
#: Shorter prompts are launches more than products.
_LEAST_PROMPT = 2048


@dataclass(frozen=True)
class Point:
    """One timed part of one model: what it reads and computes, and the seconds that it took.

    ``read`` are bytes of weights, ``cached`` those of keys and values; ``tower`` and ``attention``
    are FLOPs of the vision tower's products and of its attention, ``flops`` all others.
    """

    document: str
    name: str
    layers: int
    read: float
    flops: float
    seconds: float
    cached: float = 0.0
    tower: float = 0.0
    attention: float = 0.0


def _work(model: str) -> tuple[Plan, StepWork]:
    """Of one card, whichever: shapes alone count."""
    plan = api.predict(model, on="1xh200", engine="turbomind", tp=1)
    return plan, work_of(resolve_model(model), plan.settings, engine_named("turbomind"))


def points(results: Results) -> Iterator[Point]:
    """All of one card: ``decode_B`` are of one step, ``image`` of one image without its prefill."""
    for name, document in results.documents.items():
        if not name.startswith("s-"):
            continue
        plan, work = _work(document["model"])
        marks = {one["mark"]: one for one in document["marks"] if "seconds" in one}
        yield from _prefills(name, work, marks)
        yield from _steps(name, work, marks)
        yield from _images(name, plan, work, marks)


def _prefill_flops(work: StepWork, prompt: int) -> float:
    return prompt * work.token_flops + prompt**2 / 2 * work.pair_flops


def _prefills(name: str, work: StepWork, marks: dict[str, Any]) -> Iterator[Point]:
    for mark, one in marks.items():
        if mark.startswith("prefill_") and one["prompt"] >= _LEAST_PROMPT:
            # Each pass of a chunked prefill launches all layers.
            layers = work.layers * -(-one["prompt"] // PREFILL)
            flops = _prefill_flops(work, one["prompt"])
            yield Point(name, mark, layers, 0.0, flops, one["seconds"])


def _steps(name: str, work: StepWork, marks: dict[str, Any]) -> Iterator[Point]:
    for mark, one in marks.items():
        first = marks.get(f"first_{one['rows']}") if mark.startswith("decode_") else None
        if first is None:
            continue
        rows, tokens = one["rows"], one["tokens"] - 1
        cached = rows * (one["prompt"] + tokens / 2) * work.kv_bytes
        read, seconds = work.read_bytes(rows), (one["seconds"] - first["seconds"]) / tokens
        if seconds > 0:
            yield Point(name, mark, work.layers, read, rows * work.token_flops, seconds, cached)


def _images(name: str, plan: Plan, work: StepWork, marks: dict[str, Any]) -> Iterator[Point]:
    """By the images that were sent beside the first: the host prepares one while another runs."""
    single = marks.get("images_1")
    many = next((marks[m] for m in marks if m.startswith("images_") and m != "images_1"), None)
    rule = plan.model.image_rule
    if single is None or many is None or rule is None:
        return
    each = (many["seconds"] - single["seconds"]) / (many["rows"] - 1)
    units = _units(plan)
    tower = units * work.tower.unit_flops
    attention = work.tower.attention_flops(units)
    flops = _prefill_flops(work, single["prompt"])
    if each > 0:
        yield Point(name, "image", work.layers, 0.0, flops, each, tower=tower, attention=attention)


def _units(plan: Plan) -> int:
    """Tiles or patches of the image that was sent."""
    rule = plan.model.image_rule
    return 0 if rule is None else rule.units(*IMAGE)


def speed_readings(results: Results) -> Iterator[Reading]:
    """Of one card whose rates are known."""
    card, figures = _peaks(results.gpu), rates()
    if card is None:
        return
    found = list(points(results))
    steps = [p for p in found if p.name.startswith("decode_") and p.read and not _computes(p, card)]
    layer = _layer_seconds(steps, figures.step_seconds)
    if layer is not None:
        documents = " + ".join(dict.fromkeys(p.document for p in steps))
        yield Reading(_PRESET, "layer_seconds.value", layer, documents, "middle", share=_SHARE)
    launch = figures.layer_seconds if layer is None else layer
    for one in steps:
        moved = one.seconds - one.layers * launch - figures.step_seconds
        if moved > 0:
            share = (one.read + one.cached) / moved / card.bandwidth
            yield _reading("memory_efficiency", share, one)
    for one in found:
        if one.name.startswith("prefill_"):
            spent = one.seconds - one.layers * launch - figures.step_seconds
            if spent > 0:
                share = one.flops / spent / card.flops
                yield _reading("compute_efficiency", share, one)


def _reading(key: str, value: float, one: Point) -> Reading:
    return Reading(_PRESET, f"{key}.value", value, one.document, "middle", share=_SHARE)


def _peaks(gpu: Gpu) -> GpuRates | None:
    """The card's own, without any efficiency; None where nobody knows them."""
    bandwidth, flops = gpu.memory_bandwidth, gpu.dense_flops
    if isinstance(bandwidth, int) and isinstance(flops, int):
        rates_of_tower = {"vision_flops": flops, "vision_attention_flops": flops}
        return GpuRates(bandwidth=bandwidth, flops=flops, **rates_of_tower)
    return None


def _computes(one: Point, card: GpuRates) -> bool:
    """Whether its products, not its reads, take the time."""
    figures = rates()
    computing = one.flops / (card.flops * figures.compute_efficiency)
    return computing > one.read / (card.bandwidth * figures.memory_efficiency)


def _layer_seconds(steps: list[Point], step_seconds: float) -> float | None:
    """Least squares of ``seconds = bytes x a + layers x b + step_seconds``; None where b is open.

    Models of one size do not tell a from b: their bytes a layer must differ twofold.
    """
    read = [one.read + one.cached for one in steps]
    sizes = [size / one.layers for size, one in zip(read, steps, strict=True)]
    if not sizes or max(sizes) < 2 * min(sizes):
        return None
    rr = sum(size**2 for size in read)
    rl = sum(size * one.layers for size, one in zip(read, steps, strict=True))
    ll = float(sum(one.layers**2 for one in steps))
    rt = sum(size * (one.seconds - step_seconds) for size, one in zip(read, steps, strict=True))
    lt = sum(one.layers * (one.seconds - step_seconds) for one in steps)
    determinant = rr * ll - rl * rl
    found = (rr * lt - rl * rt) / determinant if determinant else 0.0
    return found if found > 0 else None


def beside(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """Forecast beside measured, in seconds: document, part, forecast, measured.

    An image's measured time has the host's preparation in it.
    """
    card, figures = _peaks(results.gpu), rates()
    if card is None:
        return
    for one in points(results):
        bandwidth = card.bandwidth * figures.memory_efficiency
        computed = one.flops / (card.flops * figures.compute_efficiency)
        beside_products = one.cached / bandwidth
        beside_products += one.tower / (card.vision_flops * figures.vision_efficiency)
        attending = card.vision_attention_flops * figures.vision_attention_efficiency
        beside_products += one.attention / attending
        launched = one.layers * figures.layer_seconds + figures.step_seconds
        products = max(one.read / bandwidth, computed)
        yield one.document, one.name, products + beside_products + launched, one.seconds


def ceilings(results: Results) -> dict[str, float]:
    """What a copy and a product reached, as shares of the card's own peak; of all documents."""
    found: dict[str, list[float]] = {}
    card = _peaks(results.gpu)
    for document in results.documents.values():
        for one in document.get("marks", []):
            if one["mark"] == "ceilings" and "copy" in one and card is not None:
                found.setdefault("copy", []).append(one["copy"] / card.bandwidth)
                found.setdefault("product", []).append(one["product"] / card.flops)
    return {name: statistics.median(values) for name, values in found.items()}
