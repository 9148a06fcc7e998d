"""Makes random requests, and pairs: the second request has more memory or asks for less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final, NamedTuple

import turbofit
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.machine.presets import preset_names
from turbofit.machine.spec import parse_spec
from turbofit.model.presets import known_presets
from turbofit.model.source import resolve_model
from turbofit.planning.search.sizing import MIN_TEXT_TOKENS

_MODELS: Final = (
    "internvl2-2b", "internvl2-8b", "internvl2-26b-awq", "internvl3-8b-hf", "llava-1.5-7b",
    "qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen2.5-vl-7b-awq", "qwen3-vl-8b",
    "qwen2.5-7b", "qwen2.5-14b-awq", "llama-3.1-8b",
)  # fmt: skip
_CARDS: Final = ("rtx3090", "rtx4090", "l4", "v100-32g", "a100-40g", "rtx3080-12g", "t4", "h100")
_COUNTS: Final = (1, 1, 1, 2, 2, 3, 4)
_GIB: Final = 1 << 30
#: The largest share of a card's memory that a driver may leave free.
_FREE: Final = 0.96


class Request(NamedTuple):
    """A model, a machine, and options: keywords of `turbofit.plan`."""

    model: str
    on: str
    options: dict[str, Any]

    def __str__(self) -> str:
        flags = (f"--{name.replace('_', '-')} {value}" for name, value in self.options.items())
        return " ".join((f"plan {self.model} --on {self.on}", *flags))


class Pair(NamedTuple):
    """Two requests that differ in ``kind`` only: ``more`` has more of it, or asks for less."""

    kind: str
    less: Request
    more: Request


#: Options of any request, each with the values tried; most requests have none of them.
_OPTIONS: Final = {
    "engine": ("turbomind", "pytorch"), "dtype": ("float16", "bfloat16"), "quant_policy": (4, 8),
    "images": (0, 2), "context": (2048, 8192), "goal": ("latency", "context"),
    "max_batch_size": (1, 64), "max_prefill_token_num": (2048,), "cache_max_entry_count": (0.5,),
    "enable_prefix_caching": (True,),
}  # fmt: skip


def planned(request: Request) -> Plan | None:
    """Return the plan of a request, or None if it is refused."""
    try:
        return turbofit.plan(request.model, on=request.on, **request.options)
    except TurbofitError:
        return None


def requests(count: int, seed: int) -> Iterator[Request]:
    """Yield ``count`` random requests over all presets, equal for equal seeds."""
    chance = Random(seed)
    models, cards = known_presets(), preset_names()
    for _ in range(count):
        names = chance.sample(sorted(_OPTIONS), chance.choice((0, 0, 1, 1, 2)))
        yield Request(
            model=chance.choice(models),
            on=f"{chance.choice((1, 1, 1, 2, 4, 8))}x{chance.choice(cards)}",
            options={name: chance.choice(_OPTIONS[name]) for name in names},
        )


def _gib(card: str) -> float:
    """Return the most memory of a card that may be free, in GiB."""
    total = parse_spec(f"1x{card}").gpus[0].total
    assert isinstance(total, int)
    return total / _GIB * _FREE


def _more_memory(random: Random, request: Request) -> Request:
    head, _, free = request.on.partition(":free=")
    total = _gib(head.split("x", 1)[1])
    given = float(free.removesuffix("GiB"))
    more = min(total, given + random.choice((0.05, 0.2, 0.5, 2.0, 6.0)))
    return request._replace(on=f"{head}:free={more:.2f}GiB")


def _more_cards(random: Random, request: Request) -> Request:
    count, rest = request.on.split("x", 1)
    return request._replace(on=f"{int(count) + random.choice((1, 1, 2))}x{rest}")


def _shorter_context(random: Random, request: Request) -> Request:  # noqa: ARG001
    """Halve the context, unless it would then be too short for images of the full size."""
    rule = resolve_model(request.model).image_rule
    context = request.options.get("context", 0) // 2
    images = request.options.get("images", 1)
    if rule is not None:
        most = rule.unit_tokens(rule.worst_units(rule.checkpoint_limit)) * images
        if most + MIN_TEXT_TOKENS > context:
            return request
    return _changed(request, context=context) if context else request


def _half(option: str) -> Callable[[Random, Request], Request]:
    """Return a change that halves an option, to 1 at least."""
    return lambda _, request: _changed(
        request, **{option: max(1, request.options.get(option, 1) // 2)}
    )


#: What there is more of, or less is asked for, and how.
KINDS: Final[dict[str, Callable[[Random, Request], Request]]] = {
    "free memory": _more_memory,
    "cards": _more_cards,
    "images": _half("images"),
    "context": _shorter_context,
    "concurrency": _half("concurrency"),
    "margin": lambda _, request: _changed(request, margin="64MiB"),
}
#: How often each kind is drawn: memory and cards are what people have more of.
_WEIGHTS: Final = (6, 4, 1, 1, 1, 1)


def pairs(count: int, seed: int) -> Iterator[Pair]:
    """Yield ``count`` random pairs, equal for equal seeds."""
    random = Random(seed)
    made = 0
    while made < count:
        (kind,) = random.choices(tuple(KINDS), _WEIGHTS)
        less = _request(random, kind)
        more = KINDS[kind](random, less)
        if more != less:
            made += 1
            yield Pair(kind, less, more)


def _request(random: Random, kind: str) -> Request:
    card = random.choice(_CARDS)
    free = random.uniform(0.25, 1) * _gib(card)
    options: dict[str, Any] = {}
    if kind == "concurrency" or random.random() < 0.2:
        options["concurrency"] = random.choice((2, 4, 8, 32, 128))
    if kind == "context" or random.random() < 0.2:
        options["context"] = random.choice((8192, 16384, 32768))
    if kind == "images" or random.random() < 0.15:
        options["images"] = random.choice((2, 4))
    if random.random() < 0.2:
        options["goal"] = random.choice(("latency", "context"))
    if random.random() < 0.1:
        options["queue_images"] = random.choice((True, False))
    if random.random() < 0.1:
        options["quant_policy"] = 8
    on = f"{random.choice(_COUNTS)}x{card}:free={free:.2f}GiB"
    return Request(random.choice(_MODELS), on, options)


def _changed(request: Request, **options: Any) -> Request:
    return request._replace(options={**request.options, **options})
