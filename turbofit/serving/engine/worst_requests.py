"""The requests that an engine must answer before the engine counts as ready.

The first request is the worst request of a client. The second request brings the executor's pool to
its planned size, and goes directly to the engine, since the gateway would refuse the request.
"""

from __future__ import annotations

import copy
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

from turbofit.core.images.rule import DummyImage
from turbofit.core.plan import EnginePlan, Plan
from turbofit.core.png import png
from turbofit.core.struct import JsonObject
from turbofit.memory.engines import engine_of
from turbofit.memory.worst_images import Meeting, Text, image, pictures
from turbofit.planning.speed import GroupRates, engine_rates, rates
from turbofit.planning.tower import BEFORE

#: Tokens of a short question with its chat template, estimated.
_SHORT_TEXT: Final = 64
_ANSWER: Final = 2
#: Tokens after the images in a chat, and around each image, estimated.
_AFTER: Final = 8
_AROUND: Final = 2
#: The error of the estimates above, in tokens.
_SLACK: Final = 15
#: The least share of the fullest forward's vision units that a cheaper request must have.
_NEARLY: Final = 0.98
#: The fewest tokens of the cache for a row of a full batch: one block.
_LEAST_ROW: Final = 64
#: The fewest tokens of a row's answer, if the cache has room for them.
_ROW_ANSWER: Final = 256
#: Tokens of a row's answer for each row of the batch, so that the first row still decodes when the
#: last row arrives. A row arrives within one step of decoding; four are on the safe side.
_STEPS_A_ROW: Final = 4
#: Tokens of a small answer.
_SMALL_ANSWER: Final = 8
#: Any token except a special token.
_TOKEN: Final = 100
_WORD: Final = " a"
_PROBE_TOKENS: Final = 64
#: A short prompt has at most an eighth of a session in words; a word has at most two tokens.
_SHORT: Final = 8
#: The share of the room that a long prompt fills: a tokenizer may make more tokens of a word there
#: than in a short prompt.
_SHARE: Final = 0.99
#: The check: ``auto`` sends the worst cases of a plan without a proof, else one small request.
#: ``full`` always sends the worst cases, ``quick`` always the small request.
CheckMode = Literal["auto", "full", "quick", "none"]
#: The forecast seconds of the worst cases above which the cheaper request is sent.
LONG: Final = 20.0
#: Tokens of a chat's prompt around its images, slightly overestimated.
_TEXT: Final = 64


def worst_image(plan: Plan) -> DummyImage | None:
    """Return an image with the most vision units that the plan allows; None without images."""
    rule, limit = plan.model.image_rule, plan.promise.limits.image_limit
    if rule is None or limit is None:
        return None
    size = plan.workload.image_size or rule.with_limit(limit).worst_size()
    return DummyImage(size, rule.knobs(limit) if rule.client_knobs else {})


class ProbeRequest(NamedTuple):
    """A POST to an engine, with its purpose (``name``) and its work for the engine.

    ``units`` are the vision units of each image. The request has ``rows`` prompts of ``tokens``
    text tokens; each answer has ``answer`` tokens.
    """

    name: str
    path: str
    body: dict[str, Any]
    units: tuple[int, ...] = ()
    tokens: int = _SHORT_TEXT
    rows: int = 1
    answer: int = 1


def worst_request(plan: Plan, model: str) -> ProbeRequest | None:
    """Return a chat with as many of the worst images as the plan allows; None without images."""
    image = worst_image(plan)
    if image is None:
        return None
    return _chat(
        "a worst-case request", plan, model, [image] * plan.promise.limits.images_per_request
    )


def worst_image_tokens(plan: Plan) -> int:
    """Return the tokens of the images of `worst_request`, without the tokens around an image."""
    image, rule, limits = worst_image(plan), plan.model.image_rule, plan.promise.limits
    if image is None or rule is None or limits.image_limit is None:
        return 0
    return rule.with_limit(limits.image_limit).tokens(*image.size) * limits.images_per_request


def fullest_forward(plan: Plan, engine: EnginePlan, model: str, text: int) -> ProbeRequest | None:
    """Return the request that brings the executor's pool to its planned peak.

    None if `worst_request` brings the pool to this peak. ``text``: the engine's count of a chat's
    prompt tokens, without the images.
    """
    deciding = next((term.term for gpu in engine.ledgers for term in gpu.terms if term.worst), "")
    if deciding not in _WORST:
        return None
    worst = _WORST[deciding](plan, engine, model, text)
    return None if worst is None else worst._replace(name="the fullest forward")


def other_worst_requests(
    plan: Plan, engine: EnginePlan, model: str, text: int
) -> tuple[ProbeRequest, ...]:
    """Return all worst cases except `worst_request`, named after their terms in the ledger."""
    requests = (worst(plan, engine, model, text) for worst in _WORST.values())
    return tuple(filter(None, requests))


def small_requests(plan: Plan, model: str) -> tuple[ProbeRequest, ...]:
    """Return a small request of each kind, which loads kernels that the warm-up does not load."""
    rule, requests = plan.model.image_rule, []
    if rule is not None and plan.promise.limits.vision_unit is not None:
        requests.append(_chat("a small image", plan, model, [rule.small_image]))
    body = {
        "model": model, "prompt": "What is this?", "max_tokens": _SMALL_ANSWER, "top_k": 0,
        "temperature": 1.0, "ignore_eos": True,
    }  # fmt: skip
    small = ProbeRequest("a small text", "/v1/completions", body, answer=_SMALL_ANSWER)
    return (*requests, small)


def _longest(plan: Plan, engine: EnginePlan, _model: str, _text: int) -> ProbeRequest:
    """Return a prompt that fills the context, as token ids."""
    tokens = min(engine.settings.session_len, plan.promise.context) - _ANSWER
    ids = [_TOKEN] * max(1, tokens)
    body = {"input_ids": ids, "max_tokens": _ANSWER, "top_k": 1}
    return ProbeRequest("text_prefill", "/generate", body, tokens=len(ids), answer=_ANSWER)


def _full_batch(_plan: Plan, engine: EnginePlan, model: str, _text: int) -> ProbeRequest:
    """Return one request whose prompts run together as a full batch.

    All tokens of the vocabulary may be sampled in each answer.
    """
    rows = max(1, min(engine.settings.max_batch_size, engine.kv.tokens // _LEAST_ROW))
    # Each row has its share of the cache, of which half a `_LEAST_ROW` is for the prompt.
    room = min(engine.settings.session_len, engine.kv.tokens // rows) - _LEAST_ROW // 2
    answer = max(1, min(max(_ROW_ANSWER, _STEPS_A_ROW * rows), room))
    body = {
        "model": model,
        "prompt": ["What is this?"] * rows,
        "max_tokens": answer,
        "top_k": 0,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    return ProbeRequest("sampling", "/v1/completions", body, rows=rows, answer=answer)


def _images_that_meet(plan: Plan, engine: EnginePlan, model: str, text: int) -> ProbeRequest | None:
    """Return a chat with images that bring the plan's most vision units into one forward.

    None if `worst_request`, the largest request of one client, has as many units.
    """
    meeting, alone = _meeting(plan, engine, text), plan.promise.limits.units_per_request
    if meeting.units <= alone:
        return None
    return _chat("vision_forward", plan, model, meeting.dummies)


def _meeting(plan: Plan, engine: EnginePlan, text: int, *, several: bool = False) -> Meeting:
    """Return images of a chat that bring the planned number of vision units into one forward.

    ``text``: tokens of the chat without its images. ``several``: use several smaller images instead
    of a single image, even if the smaller images have one percent fewer units.
    """
    rule, largest = plan.model.image_rule, worst_image(plan)
    if rule is None or largest is None:
        return Meeting(0, [])
    if not rule.client_knobs and plan.promise.limits.image_limit is not None:
        rule = rule.with_limit(plan.promise.limits.image_limit)
    chat_text = Text(
        before=max(0, text - _AFTER), around=_AROUND, after=_AFTER + _ANSWER + _SLACK, slack=_SLACK
    )
    make = pictures(rule, largest, with_fields=True)
    return engine_of(plan).worst_images(plan.promise, engine, make, chat_text, several=several)


#: The requests that bring terms of the ledger to their planned sizes, by term.
_WORST: Final = {
    "vision_forward": _images_that_meet, "text_prefill": _longest, "sampling": _full_batch,
}  # fmt: skip


def cheaper_forward(plan: Plan, engine: EnginePlan, model: str, text: int) -> ProbeRequest | None:
    """Return a request that fills the pool like `fullest_forward`, but encodes images less often.

    Some towers encode a whole image again in each forward with a part of the image. The one large
    image of `fullest_forward` then takes long. This request has several smaller images, and fills
    the pool half a percent less. None for a tower that sees one tile at a time, for an engine that
    encodes each image once, or without room for several images.
    """
    rule = plan.model.image_rule
    if rule is None or not rule.whole_image or not engine_of(plan).encodes_again:
        return None
    several = _meeting(plan, engine, text, several=True)
    fullest = _meeting(plan, engine, text)
    if several.units < _NEARLY * fullest.units or len(several.images) < 2:
        return None
    return _chat("the fullest forward", plan, model, several.dummies)


def image_part(image: DummyImage, colour: int = 0) -> JsonObject:
    """Return a part of a chat message: an image of one ``colour``, with its parameters."""
    url = "data:image/png;base64," + b64encode(png(*image.size, colour)).decode()
    return {"type": "image_url", "image_url": {"url": url, **image.knobs}}


def _chat(name: str, plan: Plan, model: str, images: Sequence[DummyImage]) -> ProbeRequest:
    """Return a chat with these images and a short question."""
    text, rule = {"type": "text", "text": "What is this?"}, plan.model.image_rule
    assert rule is not None
    body = {
        "model": model,
        "messages": [{"role": "user", "content": [text, *map(image_part, images)]}],
        "max_tokens": 1,
        "temperature": 0,
    }
    units = tuple(image(rule, dummy).units for dummy in images)
    return ProbeRequest(name, "/v1/chat/completions", body, units)


def longest_request(
    engine: EnginePlan,
    model: str,
    worst: ProbeRequest | None,
    tokens: int,
    count: Callable[[ProbeRequest], int],
) -> ProbeRequest | None:
    """Return a request that fills the context, for an engine that takes no token ids.

    The engine's counts for two short prompts give the tokens of a word. The request also has the
    images of ``worst``; ``tokens`` is the length of the prompt of ``worst``. None if the engine's
    answers have no counts, or if no room is left.
    """
    # The second prompt has twice the words: the difference is the tokens of `least` words.
    least = max(1, min(_PROBE_TOKENS, engine.settings.session_len // _SHORT))
    few, twice = (count(_prompt_of("a short prompt", model, n)) for n in (least, 2 * least))
    word_tokens = (twice - few) / least
    if word_tokens <= 0:
        return None
    taken = tokens if worst is not None else few - least * word_tokens
    word_count = int((engine.settings.session_len - _ANSWER - taken) / word_tokens * _SHARE)
    if word_count < 1:
        return None
    if worst is None:
        return _prompt_of("the longest prompt", model, word_count)
    body = copy.deepcopy(worst.body)
    body["messages"][0]["content"].append({"type": "text", "text": _WORD * word_count})
    return ProbeRequest("the longest request", worst.path, body, worst.units, word_count)


def _prompt_of(name: str, model: str, count: int) -> ProbeRequest:
    body = {"model": model, "prompt": _WORD * count, "max_tokens": 1, "temperature": 0}
    return ProbeRequest(name, "/v1/completions", body, tokens=count)


class Examined(Protocol):
    """An engine that gets the worst-case requests of its plan."""

    @property
    def plan(self) -> Plan:
        """The plan with which the engine runs."""

    @property
    def planned(self) -> EnginePlan:
        """The engine's part of the plan."""


def ask_worst(examined: Examined, model: str, ask: Callable[[ProbeRequest], int]) -> None:
    """Send requests that bring an engine's memory to the plan's peak, before clients come.

    ``ask`` sends a request and returns the number of tokens of its prompt, 0 if unknown. The first
    answer shows how many tokens the engine counts; the last request fills the executor's pool.
    """
    plan, engine = examined.plan, examined.planned
    if cheaper_check(plan, engine, model):
        small, rule = small_requests(plan, model)[0], plan.model.image_rule
        text = max(0, ask(small) - (0 if rule is None else rule.tokens(*rule.small_image.size)))
        last = cheaper_forward(plan, engine, model, text)
    else:
        worst = worst_request(plan, model)
        tokens = 0 if worst is None else ask(worst)
        if plan.backend.serial:
            last = longest_request(engine, model, worst, tokens, ask)
        else:
            last = fullest_forward(plan, engine, model, max(0, tokens - worst_image_tokens(plan)))
    if last is not None:
        ask(last)


def ask_small(engine: Examined, model: str, ask: Callable[[ProbeRequest], int]) -> None:
    """Send an engine one small request, with an image if the model takes images."""
    ask(small_requests(engine.plan, model)[0])


def check_seconds(plan: Plan) -> float:
    """Return the forecast seconds of `ask_worst` for the slowest group; all groups work at once.

    The forecast ignores that an engine prepares an image while it encodes another image. The real
    seconds on an H100 and an H200 were 0.8 to 1.3 times the forecast.
    """
    return max(
        seconds_of(plan, engine, cheaper_check(plan, engine) or whole_check(plan, engine, ""))
        for engine in plan.engines
    )


def cheaper_check(plan: Plan, engine: EnginePlan, model: str = "") -> tuple[ProbeRequest, ...]:
    """Return the cheaper requests that replace the worst cases above `LONG` seconds; else empty."""
    if seconds_of(plan, engine, whole_check(plan, engine, model)) <= LONG:
        return ()
    cheaper = cheaper_forward(plan, engine, model, _TEXT)
    fullest = fullest_forward(plan, engine, model, _TEXT)
    # Images do not fill the pool if a prompt or a batch decides the pool's peak.
    if cheaper is None or fullest is None or fullest.path != cheaper.path:
        return ()
    return small_requests(plan, model)[0], cheaper


def whole_check(plan: Plan, engine: EnginePlan, model: str) -> tuple[ProbeRequest, ...]:
    """Return the worst cases of `ask_worst`, which may be replaced above `LONG` seconds.

    The length of a prompt's text is assumed, since only an engine counts tokens.
    """
    requests = worst_request(plan, model), fullest_forward(plan, engine, model, _TEXT)
    return tuple(filter(None, requests))


def seconds_of(plan: Plan, engine: EnginePlan, questions: Iterable[ProbeRequest]) -> float:
    """Return the forecast seconds of one engine for these requests, one after another."""
    group, account = engine_rates(plan, engine), engine_of(plan)
    questions = list(questions)
    forward = account.forward_tokens(engine.settings)
    seconds = sum(_request_seconds(plan, group, forward, question) for question in questions)
    compiled = plan.backend.on_torch and any(question.units for question in questions)
    return seconds + (rates().kernel_seconds if compiled else 0.0)


def _request_seconds(plan: Plan, group: GroupRates, forward: int, question: ProbeRequest) -> float:
    """Return the forecast seconds of one request: images, prompts, then answers."""
    figures, rule, tower = rates(), plan.model.image_rule, group.work.tower
    place, seconds = BEFORE, 0.0
    for units in question.units:
        assert rule is not None
        tokens = rule.unit_tokens(units)
        seconds += tower.encodings(place, tokens, forward) * group.tower_seconds(units)
        seconds += units * rule.unit_side**2 * figures.pixel_seconds
        place += tokens
    prompt = (place - BEFORE + question.tokens) * question.rows
    prefill = group.seconds(figures, prompt, pairs=prompt**2 / 2 / question.rows)
    step = group.seconds(figures, question.rows, cached=prompt)
    return seconds + prefill + question.answer * step
