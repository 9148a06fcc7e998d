"""Where to cut a model into whole layers: the fewest devices, evenly filled, in order."""

from __future__ import annotations

from turbofit.memory.transformers.model_copy import Load, ModelCopy, Placement

__all__ = ["best_placement", "device_map", "fewest_offloaded", "holds", "nowhere", "place_all"]


def best_placement(copy: ModelCopy, load: Load) -> Placement:
    """All layers on GPUs where they fit, else as many as fit; on none where nothing helps."""
    return place_all(copy, load) or fewest_offloaded(copy, load) or nowhere(copy)


def nowhere(copy: ModelCopy) -> Placement:
    """Every layer off the GPUs: only what must stay on them is left."""
    return Placement(devices=len(copy.gpus), layers=(None,) * len(copy.parts.layers))


def holds(copy: ModelCopy, load: Load) -> bool:
    """Whether the copy's devices hold the whole model for this request."""
    return _filled(copy, load, 0, 0) is not None


def place_all(copy: ModelCopy, load: Load) -> Placement | None:
    """The placement on all devices of the copy that leaves the most everywhere.

    None where they do not hold it. Layers stay in order: each cut costs one transfer a token.
    """
    found = _filled(copy, load, 0, 0)
    if found is None or len(copy.gpus) == 1:
        return found
    low, high = 0, max(copy.room(place) for place in range(len(copy.gpus)))
    while high - low > 1 << 20:
        middle = (low + high) // 2
        placement = _filled(copy, load, 0, middle)
        if placement is None:
            high = middle
        else:
            low, found = middle, placement
    return found


def fewest_offloaded(copy: ModelCopy, load: Load) -> Placement | None:
    """The placement with the fewest layers on no device; None where not even all of them help."""
    count = len(copy.parts.layers)
    if _filled(copy, load, count, 0) is None:
        return None
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if _filled(copy, load, middle, 0) is None:
            low = middle + 1
        else:
            high = middle
    return _filled(copy, load, low, 0)


def device_map(copy: ModelCopy, placement: Placement, host: int | None) -> dict[str, int | str]:
    """The map in Transformers' own names.

    Args:
        copy: of the model.
        placement: of its layers.
        host: bytes of host memory that offloaded layers may take; None where it is not known. What
            does not fit is read from disk at every token.
    """
    layout, parts, last = copy.layout, copy.parts, placement.devices - 1
    text = layout.text
    made: dict[str, int | str] = dict.fromkeys(layout.first, 0)
    made[f"{text}.embed_tokens"] = 0
    made[f"{text}.rotary_emb"] = 0
    left = host
    for number, place in enumerate(placement.layers):
        where: int | str
        if place is not None:
            where = place
        elif left is None:
            where = "cpu"
        else:
            left -= parts.layers[number].weights
            where = "cpu" if left >= 0 else "disk"
        made[f"{text}.layers.{number}"] = where
    made[f"{text}.norm"] = last
    made["lm_head"] = 0 if parts.tied else last
    return made


def _filled(copy: ModelCopy, load: Load, offloaded: int, spare: int) -> Placement | None:
    """Layers poured into the devices in order, ``spare`` bytes left on each.

    Offloaded layers follow those of the first device, which runs them; on a single device they are
    in the middle.
    """
    devices, count = len(copy.gpus), len(copy.parts.layers)
    resident: list[int | None] = []
    guests = sum(copy.cache_bytes(number, load) for number in range(offloaded))
    for place in range(devices):
        block = copy.block(range(count)) if place == 0 and offloaded else 0
        text = max(copy.activations(place, load, block=block).values())
        # What loading holds for a while, and the tower, have the cache's room to themselves.
        early = max(copy.vision(place, load), copy.staging())
        room = copy.room(place) - copy.resident_bytes(place, devices) - spare
        weights, cache = 0, guests if place == 0 else 0
        if max(early, cache + text) > room:
            return None
        while len(resident) < count - offloaded:
            number = len(resident)
            weights += copy.parts.layers[number].weights
            cache += copy.cache_bytes(number, load)
            if weights + max(early, cache + text) > room:
                break
            resident.append(place)
    if len(resident) < count - offloaded:
        return None
    first = sum(1 for place in resident if place == 0)
    at = (first + 1) // 2 if devices == 1 else first
    without: list[int | None] = [None] * offloaded
    return Placement(devices=devices, layers=(*resident[:at], *without, *resident[at:]))
