"""A plan as a document: the answer, memory, capacity, reasons and commands."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.errors import option_of
from turbofit.core.machine import named_cards
from turbofit.core.messages import SLOW_IMAGES, counted, groups_of, plural
from turbofit.core.plan import alike, roomier_limit
from turbofit.core.units import format_bytes, three_digits, two_digits
from turbofit.machine.presets import other_sizes, usual_assumptions
from turbofit.planning.alternatives import WITHOUT
from turbofit.planning.own_drafts import DRAFTS
from turbofit.planning.verdict import all_fitting
from turbofit.report.painters.document import (
    ONLY_ON_PAGE,
    ONLY_SHORT,
    ONLY_WHOLE,
    Code,
    FactList,
    Heading,
    Items,
    Verdict,
    first_warnings,
    in_brief,
    known_facts,
    listed,
    remark,
    remedies_table,
    table,
)
from turbofit.report.views.figures import (
    command_blocks,
    for_older_release,
    limits_not_kept,
    per_engine_blocks,
    serve_note,
    shared_settings,
    shell_words,
)
from turbofit.report.views.machine_view import ways_text
from turbofit.report.views.memory_view import memory_blocks

if TYPE_CHECKING:
    from turbofit.core.forecast import Throughput
    from turbofit.core.plan import Candidate, Plan
    from turbofit.core.run_report import RunReport
    from turbofit.report.painters.document import Block, Tone

#: The most remedies in the short answer.
_REMEDIES: Final = 3
#: The most remedies in the short answer if no remedy makes the plan fit.
_CLOSER: Final = 1
#: The most candidates in the whole text; a page has all.
_CANDIDATES: Final = 8
#: Settings of a candidate that have a column; a terminal leaves out the columns of `_ASIDE`.
_SETTINGS: Final = {
    "prefill": "max_prefill_token_num", "batch": "max_batch_size", "context": "session_len",
    "image limit": "limit", "cache ratio": "cache_max_entry_count",
}  # fmt: skip
_ASIDE: Final = ("context", "image limit", "cache ratio")


#: The characters of a reason in the short answer.
_REASON: Final = 68
#: A note with a prediction that fits, for a person whose engine died with these settings.
_DIED: Final = "turbofit diagnose LOG says why an engine died with these settings"
#: Settings in the short answer, after the image limit, in this order.
_FEW: Final = ("max_prefill_token_num", "max_batch_size", "session_len", "quant_policy")
#: A lower image limit is shown if it serves at least this many times the requests of the plan.
_WORTH: Final = 1.5


def plan_view(plan: Plan, run: RunReport | None = None) -> list[Block]:
    """Return the view of a plan or a prediction, and of the run if the plan was launched."""
    text = "more: --full, --md or --json; as a page: turbofit report latest --html FILE"
    return [
        *_answer(plan),
        *memory_blocks(plan),
        *listed("Notes", plan.warnings),
        *_capacity(plan),
        *_limits(plan),
        *_rehearsal_and_run(plan, run),
        Heading("What was asked, and the shape chosen"),
        _facts(plan),
        *_settings(plan),
        *per_engine_blocks(plan),
        *_considered(plan),
        *command_blocks(plan),
        remark(text, **ONLY_SHORT),
    ]


def _answer(plan: Plan) -> list[Block]:
    """Return the verdict, the first warnings, remedies, and the facts of the short answer."""
    tone: Tone = "good" if plan.fits else "bad"
    # The plan's own warnings come before warnings of the machine.
    warnings = sorted(plan.warnings, key=lambda text: text in plan.machine.warnings)
    instead = tuple(text for text in plan.warnings if text.startswith(WITHOUT))
    blocks: list[Block] = [
        Heading(_title(plan), short=True),
        Verdict(plan.verdict, tone, short=True),
        *([Items(instead, tone="warn", **ONLY_SHORT)] if instead else []),
        *first_warnings(warnings, {*usual_assumptions(), *instead, *_said_by_speed(plan)}),
    ]
    if plan.serve is not None:
        if note := serve_note(plan):
            blocks.append(remark(note.capitalize(), **ONLY_ON_PAGE))
        text = f"{limits_not_kept(plan)}; the commands of the engines are in the last section."
        blocks += [
            Code(shell_words(plan.serve.argv), name="the command", **ONLY_ON_PAGE),
            remark(text, **ONLY_ON_PAGE),
        ]
    if not plan.fits:
        shown = all_fitting(plan)[:_REMEDIES] or plan.remedies[:_CLOSER]
        blocks += remedies_table(shown, **ONLY_SHORT)
        blocks += remedies_table(plan.remedies, "What would fit, cheapest first")
    return [*blocks, known_facts(_short_facts(plan), short=True, whole=False, page=plan.fits)]


def _said_by_speed(plan: Plan) -> list[str]:
    """Return the warnings that the row of an unknown speed says, too."""
    unknown = plan.throughput is not None and plan.throughput.requests_per_second is None
    return [text for text in plan.warnings if unknown and text.startswith(SLOW_IMAGES)]


def _title(plan: Plan) -> str:
    """Return the plan's title, in which a card's name of two sizes has both of them."""
    found = other_sizes(plan.machine.warnings)
    sizes = [f"{size.taken} GB; for {size.gigabytes} GB write {size.spec}" for size in found]
    if len(found) > 1:
        sizes = [f"{size.name}: {text}" for size, text in zip(found, sizes, strict=True)]
    on = f"{plan.machine.name} ({', '.join(sizes)})" if sizes else plan.machine.name
    return f"{plan.model.name} on {on} with {plan.backend.name}"


def _short_facts(plan: Plan) -> dict[str, str]:
    """Return by name the facts of the short answer: limits of a request, settings, forecasts."""
    facts = {"promise": _promised(plan) if plan.fits else "", "settings": _few_settings(plan)}
    if plan.considered and plan.promise.context:
        facts["KV cache"] = _in_cache(plan)  # a prediction has it in its verdict
    if speed := plan.throughput:
        facts["speed" if speed.requests_per_second is None else "forecast"] = _forecast(plan, speed)
        facts["first token"] = _first_tokens(plan, speed)
        host = plan.usual_image.host if plan.usual_image else speed.host
        facts["host"] = host.words if host is not None and host.binds else ""
    facts["smaller"] = _trade(plan)
    facts["best at"] = plan.backend.reason if plan.workload.goal == "latency" else ""
    facts["engine"] = in_brief(plan.why_engine, _REASON)
    drafts = next((reason for reason in plan.reasons if reason.startswith(DRAFTS)), "")
    facts["drafts"] = drafts.removeprefix(DRAFTS)
    facts["died?"] = _DIED if plan.fits and not plan.considered else ""
    if plan.rehearsal is not None:
        engine = "LMDeploy" if plan.backend.of_lmdeploy else "Transformers"
        rehearsed = f"{plan.rehearsal.outcome} with {engine} {plan.rehearsal.engine_version}"
        facts["rehearsal"] = f"{rehearsed} on pretend GPUs"
    return facts


def _promised(plan: Plan) -> str:
    """Return in words the limits of a request: its images and its tokens."""
    sides = plan.workload.image_size
    size = _size(sides) if sides is not None else ""
    return plan.promise.words(plan.model.image_rule, size)


def _few_settings(plan: Plan) -> str:
    """Return the settings that decide the memory, under LMDeploy's names, as a text."""
    settings, limits = shared_settings(plan), plan.promise.limits
    if not plan.backend.of_lmdeploy:
        return ""
    few = {"cache_max_entry_count": settings["cache_max_entry_count"]}
    few["tp"] = f"{plan.tp} x {plan.replicas}"
    rule = plan.model.image_rule
    if rule is not None and rule.varies_by_limit and limits.image_limit is not None:
        few[rule.limit_name] = str(limits.image_limit)
    few |= {name: settings[name] for name in _FEW if settings.get(name) not in (None, "0")}
    if plan.serve is None and for_older_release(plan):
        # An older LMDeploy has only the settings that its own command sets.
        commands = [engine.command.argv for engine in plan.engines if engine.command]
        texts = set(chain.from_iterable(commands))
        few = {name: value for name, value in few.items() if option_of(name) in texts}
    return ", ".join(f"{name} {value}" for name, value in few.items())


def _trade(plan: Plan) -> str:
    """Return a note on a lower image limit that serves far more requests; else an empty text."""
    speed, limit = plan.throughput, plan.promise.limits.image_limit
    if limit is None or not plan.fits:
        return ""
    if roomier := roomier_limit(plan.limit_costs, limit, plan.promise.requests):
        return f"{roomier.option}: {roomier.requests_at_once} at once; larger ones are scaled down"
    if speed is None:
        return ""
    for cost in plan.limit_costs:
        times = (cost.requests_per_second or 0.0) / max(speed.requests_per_second or 0.0, 1e-9)
        if cost.limit < limit and times >= _WORTH:
            return f"{cost.option}: {two_digits(times)} times the requests"
    return ""


def _forecast(plan: Plan, speed: Throughput) -> str:
    """Return the forecast of requests a second and its surety in words, or why none is shown."""
    usual, sure = plan.usual_image, speed.surety
    if speed.requests_per_second is None:
        return sure.why if sure else ""
    texts = [f"{two_digits(speed.requests_per_second)} requests/s"]
    if plan.promise.limits.vision_unit:
        texts[0] += " of the largest images"
    if usual and usual.requests_per_second is not None:
        texts.append(f"{two_digits(usual.requests_per_second)} of {_size(usual.image_size)}")
    word = f" ({sure.word})" if sure else ""
    thinks = ", as the model thinks" if plan.model.thinks else ""
    texts.append(f"answers of {plan.workload.output_tokens:,} tokens{thinks}{word}")
    return ", ".join(texts)


def _first_tokens(plan: Plan, speed: Throughput, *, whole: bool = False) -> str:
    """Return the forecasts of the seconds to a first token and their sureties, in words.

    The forecasts are for a request to an idle engine, with a usual picture and without images. The
    ``whole`` text adds a request with the largest images, and a request among other requests.
    """
    usual, alone, size = plan.usual_image, speed.first_token_alone, plan.workload.image_size
    largest = "the largest images" if plan.promise.limits.vision_unit else "text"
    many = f"{plan.workload.images} images of " if plan.workload.images > 1 else ""
    of_size = f"of {many}{_size(size)}" if size else f"of {largest}"
    figures = [
        (speed.seconds_to_first_token_alone, of_size, alone),
        (speed.seconds_to_first_token_of_text, "of text", speed.first_token_of_text),
    ]
    if usual:
        photographs = f"of {many}{_size(usual.image_size)}"
        first = (usual.seconds_to_first_token_alone, photographs, alone)
        figures = [first, *(figures if whole else figures[1:])]
    if whole:
        there = f"while {speed.concurrent_requests} are there"
        figures.append((speed.seconds_to_first_token, there, speed.first_token))
    texts = [
        f"{two_digits(seconds)} s {what} ({sure.words if whole else sure.word})"
        for seconds, what, sure in figures
        if seconds and sure
    ]
    if texts and not whole:
        texts.append("alone")
    return ", ".join(texts)


def _size(sides: tuple[int, int]) -> str:
    return "{}x{}".format(*sides)


def _in_cache(plan: Plan, of: str = "") -> str:
    """Return the tokens of all caches, and the requests that fit in the caches, in words.

    ``of`` comes after the number of tokens and says the bytes of a token. The caches are counted
    one by one, because no request is divided over two caches.
    """
    longest, counts = plan.promise.context, list[str]()
    for size in sorted({plan.promise.request_tokens, longest}):
        if 0 < size <= longest:
            requests = sum(
                min(1, engine.kv.tokens // size)
                if plan.backend.serial
                else engine.settings.requests_in(engine.kv.tokens, size)
                for engine in plan.engines
            )
            noun = "" if counts else f" {plural(requests, 'request')}"
            counts.append(f"{requests:,}{noun} of {size:,}")
    held = f": {', or '.join(counts)}" if counts else ""
    return f"{plan.kv_tokens:,} tokens{of}{held}"


def promise_facts(plan: Plan) -> dict[str, str]:
    """Return by name the limits of a request: its context and its images."""
    promise, limits, rule = plan.promise, plan.promise.limits, plan.model.image_rule
    context = f"{promise.context:,} tokens with the answer"
    if plan.backend.of_lmdeploy:
        sizes = sorted({engine.settings.max_prefill_token_num for engine in plan.engines})
        context += f"; prefill reads {' or '.join(f'{size:,}' for size in sizes)} at a time"
    facts = {"context": context if promise.context else ""}
    if limits.vision_unit is not None and rule is not None:
        unit, side, (units, tokens) = (
            limits.vision_unit,
            rule.unit_side,
            promise.largest_image(rule),
        )
        count = promise.images
        facts["images"] = (
            f"{counted(count, 'image')} a request, of at most {units:,}"
            f" {plural(units, unit)} of {side}x{side} ({counted(tokens, 'token')})"
        )
        if units < limits.units_per_image:
            facts["images"] += f" (larger images, of up to {limits.units_per_image:,}, are refused)"
        usually, limit = rule.checkpoint_limit, limits.image_limit
        if limit is not None and rule.varies_by_limit and limit > usually:
            facts["images"] += f" (detail: high asks for {limit}; a plan lowers it to {usually})"
    return facts


def _capacity(plan: Plan) -> list[Block]:
    """Return the cache, the limits of a request, and the host memory."""
    limits, rule = plan.promise.limits, plan.model.image_rule
    sizes = sorted({format_bytes(engine.kv.bytes_per_token) for engine in plan.engines})
    cache = _in_cache(plan, f" of {' or '.join(sizes)}")
    facts = {"KV cache": cache, **promise_facts(plan)}
    if plan.replicas > 1:
        least = "at least " if len(alike(plan.engines)) > 1 else ""
        facts["each KV cache"] = f"{least}{min(it.kv.tokens for it in plan.engines):,} tokens"
    if limits.vision_unit:
        if limits.max_dynamic_patch is not None and rule is not None and rule.varies_by_limit:
            facts["max_dynamic_patch"] = str(limits.max_dynamic_patch)
        if limits.max_pixels_per_image is not None:
            facts["max_pixels"] = f"{limits.max_pixels_per_image:,} an image"
        units = max(engine.units_per_forward for engine in plan.engines)
        unit = plural(units, limits.vision_unit)
        facts["paid for"] = f"{units:,} {unit} in one forward pass"
        if plan.takes_videos:
            facts["videos"] = "1 a request, in place of an image and no larger than one"
    host = plan.host
    have = "unknown" if host.available is None else format_bytes(host.available)
    pinned, pageable = format_bytes(host.pinned), format_bytes(host.pageable)
    facts["host memory"] = f"{pinned} pinned, {pageable} pageable; available: {have}"
    return [Heading("Capacity and limits"), known_facts(facts)]


def _limits(plan: Plan) -> list[Block]:
    """Return a table of the cache and speed under other image limits."""
    if not plan.limit_costs:
        return []
    rows = (
        (
            cost.option,
            f"{cost.image_tokens:,}",
            f"{cost.kv_tokens:,}",
            f"{cost.requests_at_once:,}",
            _figure(cost.requests_per_second),
            _figure(cost.seconds_to_first_token),
        )
        for cost in plan.limit_costs
    )
    titles = ("option", "its tokens", "KV tokens", "at once", "requests/s", "first, s")
    text = (
        "forecasts for the largest image under each limit, on the same GPUs with this prefill:"
        " tokens of the image, requests a second, seconds to the first token of a request alone;"
        " a plan for the limit itself serves about as much or more"
    )
    return [
        Heading("What an image limit costs"),
        remark(text),
        table(titles, rows, right=titles[1:]),
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


def _rehearsal_and_run(plan: Plan, run: RunReport | None) -> list[Block]:
    if plan.rehearsal is None and run is None:
        return []
    # Not at the top: most plans were neither rehearsed nor run, and the import takes time.
    from turbofit.report.views.run_view import rehearsal_and_run_blocks

    return rehearsal_and_run_blocks(plan, run)


def _facts(plan: Plan) -> FactList:
    """Return model, machine, engine, workload, chosen shape and forecasts of a plan."""
    model, workload = plan.model, plan.workload
    where = ", ".join(dict.fromkeys((model.source.where, f"sizes by {model.source.sizes}")))
    size = _size(workload.image_size) if workload.image_size else "worst"
    context = f"{workload.context:,}" if workload.context else "as much as fits"
    images = _images(plan, size) if plan.promise.limits.vision_unit else ""
    at_once = workload.concurrency or plan.requests_at_once
    engine = f"LMDeploy {plan.backend.version}, {plan.backend.name}"
    if not plan.backend.of_lmdeploy:
        engine = f"Hugging Face Transformers, the fallback (accounted for {plan.backend.version})"
    queued = ", images queued" if workload.queue_images else ""
    shape = f"tp {plan.tp} x {plan.replicas}"
    facts = {
        "model": f"{model.architecture}, {model.parameters / 1e9:.2f} B parameters, "
        f"{format_bytes(model.weight_bytes)} of weights ({model.source.kind}: {where})",
        "machine": f"{named_cards(plan.machine.gpus)} ({plan.machine.source})",
        "engine": engine,
        "workload": f"{images}context {context}, {at_once:,} at once, for {workload.goal}{queued}",
        "shape": f"{shape} on {groups_of(plan.groups)}: {plan.backend.reason}",
        "links": ways_text(plan.machine),
    }
    if speed := plan.throughput:
        name = "speed" if speed.requests_per_second is None else "forecast"
        facts[name] = _forecast(plan, speed)
        if (tokens := speed.output_tokens_per_second) is not None:
            at_once = speed.concurrent_requests
            facts[name] += f"; {tokens:,.0f} output tokens/s, {at_once} at once"
        facts["rests on"] = speed.basis
        facts["first token"] = _first_tokens(plan, speed, whole=True)
        facts["host"] = speed.host.words if speed.host is not None else ""
    return known_facts(facts)


def _images(plan: Plan, size: str) -> str:
    """Return the asked images of a request in words."""
    limits, images = plan.promise.limits, plan.workload.images
    text = f"{counted(images, 'image')} a request ({size} size"
    most = limits.most_images(plan.model.image_rule)
    if most > images:
        units = limits.units_per_request
        what = plural(units, limits.vision_unit or "unit")
        text += f": {units:,} {what}, which up to {most:,} smaller ones may share"
    return f"{text}), "


def _settings(plan: Plan) -> list[Block]:
    """Return each setting with the reasons that begin with its name, then all other reasons."""
    rest = list(plan.reasons)
    rows = []
    for name, value in shared_settings(plan, "see below").items():
        matching = [reason for reason in rest if reason.split(" ", 1)[0].rstrip(":,=") == name]
        rest = [reason for reason in rest if reason not in matching]
        texts = [reason[len(name) :].lstrip(" :,=") for reason in matching]
        why = "; ".join(text.removeprefix(f"{value}: ") for text in texts)
        rows.append((name, value, why))
    settings = table(("setting", "value", "why"), rows, wrap=("why",))
    others = [Items(tuple(rest))] if rest else []
    return [Heading("Settings"), settings, *others]


def _considered(plan: Plan) -> list[Block]:
    """Return the candidates of the search: all for a page, the first candidates for text."""
    if not plan.considered:
        return []
    known = {
        name: key
        for name, key in _SETTINGS.items()
        if any(key in candidate.settings for candidate in plan.considered)
    }
    rows = []
    for candidate in plan.considered:
        engine = "" if candidate.engine == plan.backend.name else f"{candidate.engine}: "
        row = (
            f"{candidate.tp}x{candidate.replicas}",
            groups_of(candidate.groups),
            *(_value(candidate, key) for key in known.values()),
            f"{candidate.kv_tokens:,}" if candidate.fits else "-",
            _figure(candidate.score if candidate.fits else None),
            f"{engine}{candidate.why_not}" if candidate.why_not else "chosen",
        )
        rows.append(row)
    chosen = next((i for i, candidate in enumerate(plan.considered) if not candidate.why_not), None)
    whole = table(
        ("tp x n", "GPUs", *known, "KV tokens", "score", "why not"),
        rows,
        right=(*known, "KV tokens", "score"),
        wrap=("GPUs", "why not"),
        aside=_ASIDE,
        chosen=chosen,
        **ONLY_ON_PAGE,
    )
    blocks: list[Block] = [
        Heading("Considered"),
        replace(whole, rows=whole.rows[:_CANDIDATES], **ONLY_WHOLE),
        whole,
    ]
    more = len(rows) - _CANDIDATES
    if more > 0:
        blocks.append(remark(f"and {more} more (--json has all of them)", **ONLY_WHOLE))
    return blocks


def _value(candidate: Candidate, name: str) -> str:
    """Return a candidate's setting: ``-`` if absent, least and most if its engines differ."""
    settings: dict[str, Any] = candidate.settings
    values = sorted({group[name] for group in settings.get("engines", []) if name in group})
    if not values:
        values = [settings.get(name)]
    texts = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
    if len(texts) > 1:
        return f"{texts[0]}-{texts[-1]}"
    return "-" if values[0] is None else texts[0]
