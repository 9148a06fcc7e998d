"""Where to cut a model into whole layers: the fewest devices, evenly filled, in order."""

from __future__ import annotations

from turbofit.memory.transformers.ledgers import Load, Placement, TransformersAccount

__all__ = ["device_map", "fewest_offloaded", "holds", "place_all"]


def holds(account: TransformersAccount, load: Load) -> bool:
    """Whether the account's devices hold the whole model for this request."""
    return _filled(account, load, 0, 0) is not None


def place_all(account: TransformersAccount, load: Load) -> Placement | None:
    """The placement on all devices of the account that leaves the most everywhere.

    None where they do not hold it. Layers stay in order: each cut costs one transfer a token.
    """
    found = _filled(account, load, 0, 0)
    if found is None or len(account.gpus) == 1:
        return found
    low, high = 0, max(account.room(place) for place in range(len(account.gpus)))
    while high - low > 1 << 20:
        middle = (low + high) // 2
        tried = _filled(account, load, 0, middle)
        if tried is None:
            high = middle
        else:
            low, found = middle, tried
    return found


def fewest_offloaded(account: TransformersAccount, load: Load) -> Placement | None:
    """The placement with the fewest layers on no device; None where not even all of them help."""
    count = len(account.parts.layers)
    if _filled(account, load, count, 0) is None:
        return None
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if _filled(account, load, middle, 0) is None:
            low = middle + 1
        else:
            high = middle
    return _filled(account, load, low, 0)


def device_map(
    account: TransformersAccount, placement: Placement, host: int | None
) -> dict[str, int | str]:
    """The map in Transformers' own names.

    Args:
        account: of the model.
        placement: of its layers.
        host: bytes of host memory that offloaded layers may take; None where it is not known. What
            does not fit is read from disk at every token.
    """
    layout, parts, last = account.layout, account.parts, placement.devices - 1
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


def _filled(
    account: TransformersAccount, load: Load, offloaded: int, spare: int
) -> Placement | None:
    """Layers poured into the devices in order, ``spare`` bytes left on each.

    Offloaded layers follow those of the first device, which runs them; on a single device they are
    in the middle.
    """
    devices, count = len(account.gpus), len(account.parts.layers)
    resident: list[int | None] = []
    guests = sum(account.cache_bytes(number, load) for number in range(offloaded))
    for place in range(devices):
        block = account.block(range(count)) if place == 0 and offloaded else 0
        text = max(account.activations(place, load, block=block).values())
        # What loading holds for a while, and the tower, have the cache's room to themselves.
        early = max(account.vision(place, load), account.staging())
        room = account.room(place) - account.resident_bytes(place, devices) - spare
        weights, cache = 0, guests if place == 0 else 0
        if max(early, cache + text) > room:
            return None
        while len(resident) < count - offloaded:
            number = len(resident)
            weights += account.parts.layers[number].weights
            cache += account.cache_bytes(number, load)
            if weights + max(early, cache + text) > room:
                break
            resident.append(place)
    if len(resident) < count - offloaded:
        return None
    first = sum(1 for place in resident if place == 0)
    at = (first + 1) // 2 if devices == 1 else first
    nowhere: list[int | None] = [None] * offloaded
    return Placement(devices=devices, layers=(*resident[:at], *nowhere, *resident[at:]))
