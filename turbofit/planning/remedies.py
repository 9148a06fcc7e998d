"""Remedies: changes with which a plan fits; each is computed by a new search.

The cheapest come first. Changes to fewer concurrent requests come after all other changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, option_of
from turbofit.core.machine import Gpu, Link
from turbofit.core.messages import counted, indices
from turbofit.core.model import Model
from turbofit.core.plan import Remedy
from turbofit.core.struct import known
from turbofit.core.units import GIB, format_bytes, round_up
from turbofit.memory.account import Engine, capability_of
from turbofit.model.presets import four_bit_variant, fp8_variant
from turbofit.model.quantize.scheme import packed_model
from turbofit.planning.prefix_cache import with_prefix_cache
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolved_request import ResolvedRequest, host_short, vision_load_of
from turbofit.planning.search.search import EngineFit, fit_on_host, limit_that_fits
from turbofit.planning.search.shapes import kinds
from turbofit.planning.search.sizing import (
    MIN_TEXT_TOKENS,
    excess_tokens,
)
from turbofit.planning.speed import counted_tokens, link_class
from turbofit.planning.verdict import fitting

#: This many changes that make the plan fit are enough.
_MOST: Final = 3
#: The name of the hypothetical machine with more GPUs.
MORE_GPUS: Final = "more of these GPUs"
#: A change that reduces the gap by less than one percent is not shown.
_CLOSER: Final = 0.99
#: The remedy if none of the changes that were tried makes the plan fit.
OTHER_CARDS: Final = Remedy(
    change="other cards", effect="turbofit which MODEL names the fewest that keep the promise"
)


class Remedies(NamedTuple):
    """The remedies of a plan, and the person's own options that prevent it (``causes``).

    Leaving out any one of these options makes the plan fit.
    """

    remedies: tuple[Remedy, ...] = ()
    causes: tuple[str, ...] = ()


class Change(NamedTuple):
    """One change of a request.

    ``change`` describes it, and ``request`` is the changed request. ``released`` is the person's
    own option that the change removes, as it was typed, or empty.
    """

    change: str
    request: ResolvedRequest
    released: str = ""


def remedies(fit: EngineFit) -> Remedies:
    """Return changes that make the plan fit, cheapest first, then changes that only come closer.

    After three changes that make the plan fit, only removals of the person's options are tried, to
    find the causes.
    """
    best = fit.best

    def effect_of(changed: ResolvedRequest) -> tuple[bool, str]:
        other = _planned(changed, fit.engine)
        if other is None or other.fits:
            return other is not None, "" if other is None else _plan_words(other)
        # If images are longer than the context, the missing bytes do not measure the gap.
        too_long = any(excess_tokens(it.request, it.best.vision_load) for it in (fit, other))
        if too_long or not 0 < other.best.short < best.short * _CLOSER:
            return False, ""
        short, before = map(format_bytes, (other.best.short, best.short))
        return False, f"not enough alone: {short} short instead of {before}, the margin included"

    # If a change without more cards fits, changes to more cards are left out, unless only the
    # number of requests is too small.
    helps, causes = helpful(
        _changes(fit), effect_of, enough=best.fits, cheap=not best.held_requests
    )
    if best.fits:  # no GPU memory is missing
        return Remedies((*helps, _more_host_memory(fit)), causes)
    return Remedies(helps, causes)


def helpful(
    changes: Iterator[Change],
    effect_of: Callable[[ResolvedRequest], tuple[bool, str]],
    *,
    enough: bool,
    cheap: bool,
) -> Remedies:
    """Return the changes that make the plan fit, then the changes that only come closer.

    For a changed request, ``effect_of`` returns whether the plan fits, and the effect in words. The
    words are empty if the change does not help. With ``enough``, no change to more cards is tried.
    Otherwise such changes are tried until one of them makes the plan fit; with ``cheap``, until any
    change makes the plan fit.
    """
    helps: list[Remedy] = []
    closer: list[Remedy] = []
    causes: list[str] = []
    for change, changed, released in changes:
        more = changed.machine.name == MORE_GPUS
        if (more and enough) or (len(helps) >= _MOST and not released):
            continue
        fits, words = effect_of(changed)
        if fits:
            helps.append(fitting(change, words))
            causes += [released] if released else []
            enough |= more or cheap
        elif words:
            closer.append(Remedy(change=change, effect=words))
    others = () if helps or enough else (OTHER_CARDS,)
    return Remedies((*helps, *others, *closer), tuple(causes))


def _planned(request: ResolvedRequest, engine: Engine) -> EngineFit | None:
    """Return the search result of a changed request; None if the request cannot be planned."""
    try:
        return with_prefix_cache(fit_on_host(request, engine))
    except TurbofitError:
        return None


def _more_host_memory(fit: EngineFit) -> Remedy:
    """Return the remedy to free as many bytes of host memory as one engine lacks.

    If one engine alone does not fit on the GPUs, the remedy names the bytes that all engines lack.
    """
    smallest = fit
    if fit.request.replicas is None and fit.best.shape.replicas > 1:
        alone = _planned(replace(fit.request, replicas=1), fit.engine)
        smallest = alone if alone is not None and alone.best.fits else fit
    size = format_bytes(round_up(host_short(smallest.host), GIB))
    return fitting(f"free {size} of host RAM", _plan_words(smallest))


def _changes(fit: EngineFit) -> Iterator[Change]:
    """Yield the changes to try, cheapest first."""
    request = fit.request
    yield from left_to_turbofit(request)
    yield from _over_unequal_cards(request)
    yield from _usual_margin(request)
    if request.workload.queue_images is False:
        out = "--no-queue-images"
        yield Change(f"leave {out} out", request.with_workload(queue_images=None), out)
    if request.replicas is not None and (request.replicas > 1 or request.promised_requests):
        # Each copy needs the cards for a whole model; a single copy may use all cards.
        copies = f"--replicas {request.replicas}"
        yield Change("leave --replicas to turbofit", replace(request, replicas=None), copies)
    images, workload = _smaller_images(fit), smaller_workload(request, "what the cache holds")
    # If a person gave the images' size, a lower image limit comes before fewer images.
    sized = request.workload.image_size is not None
    yield from chain(*((images, workload) if sized else (workload, images)))
    yield from quantised_cache(request)
    yield from _other_checkpoint(request)
    # As many requests at once as the caches hold; one if only host memory is missing.
    count = 1 if fit.best.fits else fit.best.held_requests
    if 0 < count < (request.promised_requests or 1):
        yield fewer_at_once(request, count)
    if request.tp is not None and len(request.visible) > request.tp:
        free = replace(request, tp=None, replicas=None)
        yield Change("leave --tp to turbofit", free, f"--tp {request.tp}")
    yield from with_more_gpus(request)
    yield from _made_checkpoint(request)
    yield from stopped(request)


def left_to_turbofit(request: ResolvedRequest) -> Iterator[Change]:
    """Yield for each engine option of the user, and for the budget, its removal."""
    for name, value in request.engine_options.items():
        rest = {key: value for key, value in request.engine_options.items() if key != name}
        written = PlanRequest.model_construct(None, **{name: value}).option_arguments()
        changed = replace(request, engine_options=rest)
        yield Change(f"leave {option_of(name)} to turbofit", changed, " ".join(written))
    if request.budget is not None:
        given = request.budget
        budget = f"--budget {given if isinstance(given, str) else format_bytes(given)}"
        yield Change("leave --budget out", replace(request, budget=None), budget)


def _over_unequal_cards(request: ResolvedRequest) -> Iterator[Change]:
    """Yield changes to an engine over more cards than are equal; the search makes none unasked."""
    alike = max(map(len, kinds(request.visible)))
    for tp in (2, 4, 8):
        if request.tp is None and alike < tp <= len(request.visible):
            yield Change(f"--tp {tp}, over unequal cards", replace(request, tp=tp))


def _usual_margin(request: ResolvedRequest) -> Iterator[Change]:
    """Yield the change to the default margin, if a person asks for more than twice this margin.

    An LMDeploy that is newer than the account doubles the default margin.
    """
    margin = request.margin
    if margin.bytes is None and margin.share is None:
        return
    usual = replace(margin, bytes=None, share=None)
    most, given = (max(map(rule.of, request.visible)) for rule in (usual, margin))
    if given <= 2 * most:
        return
    share = f"{(margin.share or 0) * 100:.6g}%"
    option = f"--margin {share if margin.bytes is None else format_bytes(margin.bytes)}"
    yield Change("leave --margin to turbofit", replace(request, margin=usual), option)


def fewer_at_once(request: ResolvedRequest, count: int) -> Change:
    """Return the change to ``count`` concurrent requests."""
    option = f"--concurrency {request.workload.concurrency}"
    return Change(f"--concurrency {count}", request.with_workload(concurrency=count), option)


def smaller_workload(request: ResolvedRequest, held: str) -> Iterator[Change]:
    """Yield changes that leave the context to turbofit, and changes to fewer images in a request.

    ``held`` says what then bounds the context, such as "what fits".
    """
    images, context = request.workload.images, request.workload.context
    if context is not None:
        free, option = request.with_workload(context=None), f"--context {context}"
        yield Change(f"leave --context to {held}", free, option)
    requested_load = vision_load_of(request, request.requested_image_limit)
    excess = excess_tokens(request, requested_load)
    if excess:
        tokens = requested_load.tokens_per_request // requested_load.images_per_request
        fewer = images - -(-excess // tokens)
        if fewer > 1:
            yield Change(f"--images {fewer}", request.with_workload(images=fewer))
    if images > 1:
        yield Change("--images 1", request.with_workload(images=1), f"--images {images}")


def _smaller_images(fit: EngineFit) -> Iterator[Change]:
    """Yield the change that leaves the image limit to turbofit, and a change to a lower limit.

    The lower limit is half the user's own limit. If the plan only holds too few requests, or if the
    images' size is given, the lower limit is the largest limit that fits.
    """
    request, best = fit.request, fit.best
    rule, requested = request.model.image_rule, request.requested_image_limit
    if rule is None or requested is None or requested <= 1:
        return
    given = "" if request.image_limit is None else f"{rule.limit_option} {requested}"
    if given:
        yield Change(
            f"leave {rule.limit_option} to turbofit", replace(request, image_limit=None), given
        )
    lower = requested // 2 if given else None
    # The search itself lowers no image limit if the images' size is given.
    sized = request.workload.image_size is not None and not given and not best.serves
    if (best.held_requests or sized) and rule.varies_by_limit:
        lower = limit_that_fits(request, best.shape, fit.engine)
    if lower is not None:
        yield Change(f"{rule.limit_option} {lower}", replace(request, image_limit=lower), given)


def quantised_cache(request: ResolvedRequest) -> Iterator[Change]:
    """Yield changes to a KV cache in 8 and in 4 bits, unless the user gave the cache's type."""
    if "quant_policy" in request.engine_options:
        return
    for policy, name in ((8, "int8"), (4, "int4")):
        yield Change(
            f"--quant-policy {policy} ({name} KV cache)",
            replace(request, engine_options={**request.engine_options, "quant_policy": policy}),
        )


def _other_checkpoint(request: ResolvedRequest) -> Iterator[Change]:
    """Yield changes to the published checkpoint in 4 bits, and in FP8 for cards that compute it."""
    variant = four_bit_variant(request.model)
    if variant is not None:
        yield _in_four_bits(
            request, f"use {variant.hub_id or variant.name} (4-bit weights)", variant
        )
    cards = [capability_of(gpu, (0, 0)) for gpu in request.visible]
    variant = fp8_variant(request.model) if min(cards) >= (8, 9) else None
    if variant is not None:
        change = f"use {variant.hub_id or variant.name} (FP8 weights)"
        yield Change(change, replace(request, model=variant))


def _made_checkpoint(request: ResolvedRequest) -> Iterator[Change]:
    """Yield the change to a checkpoint in 4 bits that a person makes, where none is published."""
    model = request.model
    made = made_in_four_bits(model)
    if made is not None:
        name = model.hub_id or model.source.where
        yield _in_four_bits(request, f"make 4-bit weights: turbofit quantize {name}", made)


def made_in_four_bits(model: Model) -> Model | None:
    """Return the model with 4-bit weights that a person makes.

    None if published ones are known, or if none can be made.
    """
    return None if four_bit_variant(model) is not None else packed_model(model)


def _in_four_bits(request: ResolvedRequest, change: str, model: Model) -> Change:
    """Return the change to a model in 4 bits, whose kernels have no dtype but float16."""
    engine_options = dict(request.engine_options)
    if engine_options.get("dtype", "float16") != "float16":
        del engine_options["dtype"]
        change += ", and leave --dtype out"
    return Change(change, replace(request, model=model, engine_options=engine_options))


def _plan_words(fit: EngineFit) -> str:
    """Return in a few words what a plan that fits would give."""
    best = fit.best
    effect = f"{best.kv_tokens:,} KV tokens a group, tp {best.shape.tp}"
    if best.held_requests:
        size = counted_tokens(best.vision_load, best.settings.session_len)
        requests = fit.request.promised_requests or 0
        effect += f", {counted(requests, 'request')} of {size:,} tokens at once"
    rule, image_limit = fit.request.model.image_rule, best.shape.image_limit
    if rule is not None and image_limit not in (None, fit.request.requested_image_limit):
        effect += f", images lowered to {image_limit:,} {rule.limit_unit}"
        effect += f" (text beside them: {MIN_TEXT_TOKENS} tokens)"
    return effect


def with_more_gpus(request: ResolvedRequest) -> Iterator[Change]:
    """Yield changes to 2, 4 and 8 copies of the freest GPU, linked like the visible GPUs.

    The links matter for memory, too: NVLink takes some.
    """
    gpu = max(request.visible, key=lambda card: known(card.free, 0))
    alike = next(len(cards) for cards in kinds(request.visible) if gpu in cards)
    for count in (2, 4, 8):
        if count <= alike:
            continue
        machine = replace(
            request.machine,
            name=MORE_GPUS,
            gpus=tuple(replace(gpu, index=i, uuid=f"{gpu.uuid}+{i}") for i in range(count)),
            links=_links_of_more(request, gpu, count),
            visible=tuple(range(count)),
        )
        # Turbofit chooses tp and replicas for these GPUs, and the change says so.
        given = [name for name in ("tp", "replicas") if getattr(request, name) is not None]
        left_out = f", and leave {' and '.join(map(option_of, given))} out" if given else ""
        changed = replace(request, machine=machine, tp=None, replicas=None)
        yield Change(f"{count} x {gpu.name}{left_out}", changed)


def _links_of_more(request: ResolvedRequest, gpu: Gpu, count: int) -> tuple[Link, ...]:
    """Return the links of ``count`` GPUs that repeat the set of visible GPUs.

    GPUs of two sets are joined by the slowest link of the visible GPUs, but never by NVLink
    bridges. If only one GPU is visible, the links are those of its preset, or none without a
    preset.
    """
    from turbofit.machine.presets import match_preset, preset_links

    visible, machine, preset = request.visible, request.machine, match_preset(gpu)
    if len(visible) == 1:
        return preset_links([preset] * count) if preset else ()
    links = [machine.link(a.index, b.index) for a, b in combinations(visible, 2)]
    between = min(links, key=link_class)
    if between.nvlinked and preset and not preset.nvlink.default:
        between = preset_links([preset] * 2, nvlink=frozenset())[0]
    pairs = dict(zip(combinations(range(len(visible)), 2), links, strict=True))
    joined = []
    for a, b in combinations(range(count), 2):
        same = a // len(visible) == b // len(visible)
        link = pairs[a % len(visible), b % len(visible)] if same else between
        joined.append(replace(link, a=a, b=b))
    return tuple(joined)


def stopped(request: ResolvedRequest) -> Iterator[Change]:
    """Yield the change that frees the memory of the largest other process on the GPUs.

    If no process is known, the change frees all memory in use.
    """
    by_process: dict[str, dict[int, int]] = {}
    for gpu in request.visible:
        for holder in gpu.holders:
            size = known(holder.bytes, 0)
            if holder.pid != "NA" and size > 0:
                by_process.setdefault(holder.label, {})[gpu.index] = size
    freed = {gpu.index: known(gpu.used, 0) for gpu in request.visible if known(gpu.used, 0)}
    if not freed:
        return
    change = f"free the memory that others hold on GPU {indices(freed)}"
    if by_process:
        process, freed = max(by_process.items(), key=lambda item: sum(item[1].values()))
        where = f"GPU{'s' if len(freed) > 1 else ''} {indices(freed)}"
        change = f"stop {process} on {where}"

    def without(gpu: Gpu) -> Gpu:
        # NVML reads holders and sizes at different times: a holder may have more than the total.
        less = min(freed.get(gpu.index, 0), known(gpu.used, 0))
        return replace(gpu, used=known(gpu.used, 0) - less, free=known(gpu.free, 0) + less)

    gpus = tuple(without(gpu) if gpu.index in freed else gpu for gpu in request.machine.gpus)
    change += f" ({format_bytes(sum(freed.values()))})"
    yield Change(change, replace(request, machine=replace(request.machine, gpus=gpus)))
