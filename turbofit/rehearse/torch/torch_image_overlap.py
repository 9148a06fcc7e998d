"""The worst cases of a plan for an engine on torch, which takes pictures, not units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.core.images.rule import Size
from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.memory.account import vision_load_within
from turbofit.memory.engines import engine_of
from turbofit.rehearse import mixes
from turbofit.rehearse.mixes import Image, Prompt, PromptMaker
from turbofit.rehearse.spec import LONGEST, RehearsalCase, RehearsalRequest

_FRAME: Final = 32  # the most that a chat template adds to a prompt
_WRAP: Final = 8  # the most that it adds to each further picture
_TEXT: Final = 1  # letters of a prompt
_ONE: Final = 32  # letters of a request by itself
_NEW: Final = 4  # tokens to generate: one forward of prefill, three of decoding
_CUT: Final = 4  # prompts that meet, nearly always: each fills one block of the cache in part


def worst_cases(plan: Plan) -> tuple[RehearsalCase, ...]:
    """The worst cases, see `mixes.cases_of`; UsageError: see `rehearsed_size`."""
    limits, settings, rule = plan.limits, plan.settings, limited(plan).image_rule
    several = plan.engine.of_lmdeploy
    cases: dict[str, Sequence[RehearsalRequest]] = {}
    if rule is not None and limits.vision_unit is not None and limits.images_per_request:
        size = plan.workload.image_size or rehearsed_size(rule, limits.image_limit)
        images, units = limits.images_per_request, limits.units_per_request or None
        pictures = Pictures(rule, size, images, units)
        cases["vision_request"] = [_request(_ONE, pictures, pictures.request())]
        if several:
            engine = engine_of(plan)
            bound = engine.units_bound(rule, vision_load_within(limits), settings)
            room = ServerRoom(
                batch=settings.max_batch_size,
                prefill=engine.forward_tokens(settings),
                cached=plan.kv.tokens - _CUT * settings.cache_block_seq_len,
                gate=mixes.let_through(limits, bound),
            )
            # A prefix cache would save the encoding of images that it has seen.
            caching = settings.enable_prefix_caching
            cases["vision_forward"] = [
                _request(_TEXT, pictures, prompt, number if caching else None)
                for number, prompt in enumerate(worst_mix(pictures, room), 1)
            ]
    return mixes.cases_of(plan, cases, LONGEST if several else settings.session_len - _NEW, _NEW)


def limited(plan: Plan) -> Model:
    """The model with the planned limit as its own, if its stand-in is written with the limit."""
    model, limit = plan.model, plan.limits.image_limit
    carries = model.vision is not None and model.vision.kind in ("internvit", "moonvit")
    if model.image_rule is None or limit is None or not carries:
        return model
    return replace(model, image_rule=model.image_rule.with_limit(limit))


def rehearsed_size(rule: ImageRule, limit: int | None) -> tuple[int, int]:
    """The (width, height) of a picture with the most units under the limit, as square as possible.

    Raises:
        UsageError: the limit is above the checkpoint's own, which a picture's size cannot raise.
    """
    if limit is not None and limit > rule.checkpoint_limit:
        raise UsageError(
            f"{rule.limit_option} {limit} is above the checkpoint's own {rule.checkpoint_limit}",
            hint="the rehearsal sends pictures under the checkpoint's own limit; lower it",
        )
    return rule.worst_size(limit)


def _request(
    letters: int, pictures: Pictures, prompt: Prompt, images: int | None = None
) -> RehearsalRequest:
    sizes = pictures.sizes(prompt)
    return RehearsalRequest(letters, sizes=sizes, max_new_tokens=_NEW, images=images)


class ServerRoom(NamedTuple):
    """The room of an engine that serves several requests at once.

    Attributes:
        batch: requests that run at once.
        prefill: tokens of a forward.
        cached: tokens of prompts whose blocks fit into the cache together; None for no limit.
        gate: vision units that the gateway lets through together; None for no limit.
    """

    batch: int
    prefill: int
    cached: int | None = None
    gate: int | None = None


class Pictures:
    """Pictures of a rule by their units: the largest that a client sends, and smaller ones.

    A request has at most ``images`` images and ``request_units`` units (None: all of its images').
    """

    def __init__(
        self, rule: ImageRule, largest: Size, images: int, request_units: int | None = None
    ) -> None:
        self.rule, self.largest = rule, largest
        most = rule.units(*largest)
        total = most * images if request_units is None else request_units
        self._sizes: dict[Image, Size] = {}
        self._limits = rule.lower_limits() if rule.few_limits else ()
        self.maker = PromptMaker(
            self._within, most, images, total, rule.unit_step, lead=_FRAME, rest=_TEXT
        )

    def sizes(self, prompt: Prompt) -> tuple[Size, ...]:
        return tuple(self._sizes[image] for image in prompt.images)

    def request(self) -> Prompt:
        """The worst request: the largest picture, as often as a request's units allow."""
        maker = self.maker
        units = mixes.units_of_request(maker.units, maker.images, maker.request_units)
        images = [self._within(count, 1 << 40) for count in units]
        return Prompt(maker.lead, tuple(image for image in images if image is not None), maker.rest)

    def _within(self, units: int, tokens: int) -> Image | None:
        """The picture with the most units within ``units`` units and ``tokens`` tokens, or None."""
        rule, sizes = self.rule, [self.largest]
        if self._limits:
            sizes += [rule.worst_size(limit) for limit in self._limits]
        elif limit := rule.largest_limit(min(units, rule.units_within(max(0, tokens - _WRAP)))):
            sizes.append(rule.worst_size(limit))
        fits: dict[Image, Size] = {}
        for size in sizes:
            image = Image(rule.units(*size), rule.tokens(*size) + _WRAP)
            if image.units <= units and image.tokens <= tokens:
                fits.setdefault(image, size)
        self._sizes = fits | self._sizes
        return max(fits, key=lambda image: image.units, default=None)


def most_met(prompts: Sequence[Prompt], prefill: int) -> int:
    """The most units that one forward encodes, if all prompts are there before the first step.

    Whole prompts join while their tokens stay within ``prefill``. A longer prompt is cut into
    chunks, never inside a picture, and no other prompt joins it. Source: lmdeploy
    prefill_scheduler.py::_PrefillScheduler.schedule #6cb39d
    """
    most = tokens = met = 0
    for prompt in prompts:
        limit = max(prefill, *(image.tokens for image in prompt.images))
        if prompt.length > limit:
            tokens, met, most = 0, 0, max(most, *_chunks(prompt, limit))
            continue
        if tokens + prompt.length > prefill:
            tokens = met = 0
        tokens, met = tokens + prompt.length, met + prompt.units
        most = max(most, met)
    return most


def _chunks(prompt: Prompt, limit: int) -> Iterator[int]:
    """Units of each chunk of a prompt that is longer than the limit."""
    start, at, met = 0, prompt.lead, 0
    for units, tokens in prompt.images:
        if at + tokens > start + limit:
            yield met
            start, met = at, 0
        at, met = at + tokens, met + units
    yield met


def worst_mix(pictures: Pictures, room: ServerRoom) -> list[Prompt]:
    """The mix whose fullest forward encodes the most units, among mixes that clients may send.

    If no gateway counts units the mix is sent twice, so that it meets whole although the engine's
    first step takes only its first request. A prefix cache brings no further picture into a
    forward: a match ends before a picture that is not completely in it. Source: lmdeploy
    block_trie/trie.py::BlockTrie.match #8a20e4
    """
    candidates = [mix for mix in _mixes(pictures, room) if mix and len(mix) <= room.batch]
    best = max(candidates, key=lambda mix: most_met(mix, room.prefill))
    return best if room.gate is not None else (best * 2)[: room.batch]


def _mixes(pictures: Pictures, room: ServerRoom) -> Iterator[list[Prompt]]:
    maker = pictures.maker
    gate = room.gate if room.gate is not None else maker.request_units * room.batch
    cached = room.prefill if room.cached is None else min(room.prefill, room.cached)
    whole = pictures.request()
    yield [whole]  # a request longer than a forward is cut into chunks
    first = whole.images[0]
    chunk = maker.request(maker.request_units - first.units, cached + maker.lead, cached)
    if maker.images > 1 and chunk is not None and first.units + chunk.units <= gate:
        yield [Prompt(maker.lead, (first, *chunk.images)[: maker.images], maker.rest)]
    requests: list[Prompt] = []  # the largest pictures first, several in a request
    while (
        len(requests) < room.batch and (request := maker.request(gate, cached, cached)) is not None
    ):
        requests.append(request)
        cached, gate = cached - request.length, gate - request.units
    yield requests
