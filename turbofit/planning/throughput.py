"""The forecast for all engines together, bounded by the host's work on images, and its certainty.

LMDeploy decodes and resizes images, and converts them to numbers, on processor cores, in each
engine's process, with turbofit's number of threads. If this work is slower than the cards, the
cards wait. `presets/engines/surety.yaml` has the errors of each kind of forecast on published and
measured figures; `python -m bench.speed --write` writes this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final, Literal

import msgspec

from turbofit.core.forecast import HostImages, Surety, Throughput
from turbofit.core.images.rule import ImageRule, Size
from turbofit.core.machine import Gpu, Machine
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.plan import image_threads
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import NA, Struct
from turbofit.core.units import three_digits
from turbofit.machine.unlisted import slow_card
from turbofit.memory.account import AMPERE, NO_IMAGES, VisionLoad, capability_of
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.speed import Speed, rates

Word = Literal["good", "fair", "rough", "order"]

#: The photograph that `turbofit calibrate` prepares: its pixels, and the pixels of its nine tiles.
_REFERENCE: Final = (1920 * 1080, 9 * 448 * 448)
#: Nine of ten forecasts of a kind must be within these factors to be good, fair or rough; plans
#: print no figures of worse kinds.
TIMES: Final = (1.25, 1.5, 2.0)
_WORDS: Final[tuple[Word, ...]] = ("good", "fair", "rough", "order")
#: The conditions of a first token: the request runs among others, or alone.
_FIRST: Final = ("among others", "alone")
#: The end of a kind's name if its errors are on cards whose figures were not used in the fit.
UNSEEN: Final = "other cards"


class HostRate(Struct):
    """The host's rate: ``cores`` prepare images, each in ``seconds`` of one core.

    ``measured``: the figures were measured on this host.
    """

    cores: int
    seconds: float
    measured: bool = False

    @property
    def images_per_second(self) -> float:
        return self.cores / self.seconds

    @property
    def words(self) -> str:
        """The seconds of an image on one core, and whether they were measured, in words."""
        how = "as measured here" if self.measured else "as on a usual core"
        return f"an image takes {three_digits(self.seconds)} s of one core of the host, {how}"

    def beside(self, of_cards: float | None) -> HostImages:
        """Return the images a second of the host and, unless None, of the cards (``of_cards``)."""
        return HostImages(
            cores=self.cores,
            images_per_second=round(self.images_per_second, 2),
            gpu_images_per_second=of_cards,
            measured=self.measured,
        )


def host_rate(
    machine: Machine,
    rule: ImageRule | None,
    load: VisionLoad,
    engines: int,
    *,
    size: Size | None = None,
    threads: int | None = None,
) -> HostRate | None:
    """Return how fast the host prepares a load's images, for this number of engines of LMDeploy.

    A picture without ``size`` has as many pixels as its units, so the rate is too high for larger
    pictures. ``threads`` of each engine prepare images; None means turbofit's choice. Returns None
    without images, or if the host's cores are unknown. The rate is too high if other processes use
    the cores, too low if clients send the same image again.
    """
    cores = machine.host.cpus
    if rule is None or not load.units_per_image or cores == NA:
        return None
    threads = threads or image_threads(int(cores), engines)
    seconds = _seconds_here(machine, rule, load, size, by_float=threads == 1)
    busy = min(int(cores), threads * engines)
    measured = machine.measured is not None and bool(machine.measured.image_seconds)
    return HostRate(cores=busy, seconds=seconds, measured=measured)


def _seconds_here(
    machine: Machine, rule: ImageRule, load: VisionLoad, size: Size | None, *, by_float: bool
) -> float:
    """Return the seconds in which one core of this host prepares an image of a load."""
    seconds, figures = image_seconds(rule, load.units_per_image, size, by_float=by_float), rates()
    measured = machine.measured.image_seconds if machine.measured is not None else 0.0
    photograph, tiles = _REFERENCE
    usual = photograph * figures.tile_source_seconds + tiles * figures.tile_prepared_seconds
    return seconds * measured / usual if measured else seconds


def image_seconds(
    rule: ImageRule, units: int, size: Size | None = None, *, by_float: bool = False
) -> float:
    """Return the seconds in which one core prepares an image.

    A picture without ``size`` has as many pixels as its units. ``by_float``: LMDeploy's own code
    prepares the image.
    """
    prepared, figures = units * rule.unit_side**2, rates()
    pixels = prepared if size is None else size[0] * size[1]
    if not rule.by_table:
        return (
            pixels * figures.processor_source_seconds
            + prepared * figures.processor_prepared_seconds
        )
    each = figures.tile_float_seconds if by_float else figures.tile_prepared_seconds
    return pixels * figures.tile_source_seconds + prepared * each


def with_host(of_cards: float, at_once: float, host: HostRate, images: int) -> tuple[float, float]:
    """Return the requests a second, and the seconds that the host adds to a first token.

    ``of_cards`` is the requests a second of the cards alone, with ``at_once`` requests at any time;
    ``images`` is the number of images in a request. While the host works on one request's images,
    the cards work for other requests; with only one request, the times of host and cards add up.
    """
    prepared, seconds = host.images_per_second / images, host.seconds * images
    waits = at_once * max(0.0, 1 / prepared - 1 / of_cards)  # if the host is slower than the cards
    rate = min(prepared, of_cards if at_once > 1 else 1 / (1 / of_cards + seconds))
    return rate, seconds + waits


def server_seconds(load: VisionLoad) -> float:
    """Return the seconds of one request in the server and the tokenizer, before any forward."""
    figures = rates()
    tokens = load.tokens_per_request + load.text_tokens
    return figures.server_seconds + tokens * figures.server_token_seconds


def _basis_words(machine: Machine, host: HostRate | None, images: int, source: str) -> str:
    """Say what a forecast rests on: cards and links, and the host if there are images.

    ``source`` says what was timed, where and when, if anything was.
    """
    rests, measured = "rates assumed, not measured", machine.measured
    if source:
        rests = source
    elif measured is not None and (measured.cards or measured.reduces):
        rests = f"cards and links as measured here with torch {measured.torch}, the rest assumed"
    if not images:
        return rests
    uncounted = "in requests a second the host is not counted: its cores are not known"
    return f"{rests}; {host.words if host else uncounted}"


def forecast(
    request: ResolvedRequest,
    speeds: Sequence[Speed],
    load: VisionLoad,
    *,
    engine: str,
    gpus: Sequence[Gpu],
    texts: Sequence[Speed] = (),
) -> Throughput:
    """Forecast the speed of all engines together, with the certainty of each figure.

    ``engine`` and ``gpus`` determine the certainty. ``texts`` are the speeds without images: they
    tell the first token of a request without images. If the host's cores are unknown, its work on
    images is only counted in the time to the first token of a request that runs alone.
    """
    images, machine = load.images_per_request, request.machine
    rule, size = request.model.image_rule, request.workload.image_size
    threads = request.image_threads
    host = host_rate(machine, rule, load, len(speeds), size=size, threads=threads)
    of_cards = rate = sum(speed.requests_per_second for speed in speeds)
    there = sum(speed.requests_per_second * speed.seconds_per_request for speed in speeds)
    seconds = max(speed.seconds_to_first_token for speed in speeds)
    alone = max(speed.alone for speed in speeds) + server_seconds(load)
    model, with_images = request.model, bool(load.units_per_image)
    kind = kind_of(model, engine, gpus, images=with_images)
    surety = surety_of(kind, gpus)
    source = min(speed.source for speed in speeds)  # empty if an engine was not timed
    rests = _basis_words(machine, host, images, source)
    among, first = (surety_of(f"first token {how}, {kind}", gpus) for how in _FIRST)
    prepares = None
    if host is not None and images:
        prepares = host.beside(surety.shown(images * of_cards, 2))
        rate, waits = with_host(of_cards, there, host, images)
        seconds += waits
    if rule is not None and images and with_images:
        alone += images * _seconds_here(machine, rule, load, size, by_float=threads == 1)
    first_of_text = of_text = None
    if texts:
        kind = kind_of(model, engine, gpus, images=False)
        of_text = surety_of(f"first token alone, {kind}", gpus)
        seconds_of_text = max(speed.alone for speed in texts) + server_seconds(NO_IMAGES)
        first_of_text = of_text.shown(seconds_of_text, 3)
    return Throughput(
        basis=(
            f"estimate: {load.text_tokens} text tokens beside the workload's images, "
            f"{load.output_tokens} answered; {rests}; {surety.words}"
        ),
        requests_per_second=surety.shown(rate, 4),
        output_tokens_per_second=surety.shown(rate * load.output_tokens, 1),
        concurrent_requests=round(sum(speed.running for speed in speeds)),
        seconds_to_first_token=among.shown(seconds, 3),
        seconds_to_first_token_alone=first.shown(alone, 3),
        seconds_to_first_token_of_text=first_of_text,
        host=prepares,
        surety=surety,
        first_token=among,
        first_token_alone=first,
        first_token_of_text=of_text,
    )


class Errors(Struct):
    """How far forecasts of one kind were off.

    Half of the ``figures`` differ by at most the share ``median``, nine of ten by at most ``p90``.
    Nine of ten are off by at most the factor ``times``, the worst by the factor ``worst``.
    ``measured`` says in words what was measured, if plans print no figure of the kind.
    """

    figures: int
    median: float
    p90: float
    times: float
    worst: float
    cards: tuple[str, ...]
    measured: str = ""


@cache
def errors_of() -> dict[str, Errors]:
    """Return the errors of all kinds with at least one figure."""
    return msgspec.convert(load_yaml(preset_path("engines", "surety")), dict[str, Errors])


def kind_of(model: Model, engine: str, gpus: Iterable[Gpu], *, images: bool) -> str:
    """Return the name of a forecast's kind.

    Forecasts are of one kind if they have the same errors: of text or of images in tiles or
    patches; of models with experts or delta nets; on an engine; on a generation of cards.
    """
    rule = model.image_rule
    parts = {"experts": model.text.moe, "delta nets": model.text.delta, "drafts": model.draft}
    traits = [name for name, part in parts.items() if part]
    what = f"images in {plural(2, rule.unit_name)}" if rule is not None and images else "text"
    of_model = f" of {' and '.join(traits)}" if traits else ""
    return f"{what}{of_model} with {engine}{_of_cards(tuple(gpus))}"


def _of_cards(gpus: Sequence[Gpu]) -> str:
    """Return the clause of a kind that names the generation of its cards; empty since Ampere."""
    if any(slow_card(gpu.name) for gpu in gpus):
        return " on cards without tensor cores"
    if any(NA in (gpu.memory_bandwidth, gpu.dense_flops) for gpu in gpus):
        return " on cards whose rates nobody knows"
    if any(capability_of(gpu) < AMPERE for gpu in gpus):
        return " on cards before Ampere"
    return ""


def surety_of_speed(model: Model, engine: str, gpus: Sequence[Gpu], *, images: bool) -> Surety:
    """Return how sure requests and tokens a second are of a model, on an engine and cards.

    ``known`` of the result says whether this speed is known at all, and ``word`` how well. Plans
    print no speed that is not known, and pretend GPUs have no clock then.
    """
    return surety_of(kind_of(model, engine, gpus, images=images), gpus)


def surety_of(kind: str, gpus: Iterable[Gpu]) -> Surety:
    """Return how certain a kind of forecast is on these cards.

    The certainty follows from the errors of this kind of forecast. If some of these cards have no
    known errors, the errors on cards that no fit has seen count. If such errors are unknown, or
    are of a single card, the certainty is one step lower.
    """
    known, cards = errors_of(), {gpu.name for gpu in gpus}
    found, other = known.get(kind), known.get(f"{kind}, {UNSEEN}")
    if other is not None and not (found is not None and cards <= set(found.cards)):
        kind, found = f"{kind}, {UNSEEN}", other
    if found is None:
        return Surety(kind=kind, word="unknown")
    seen = cards <= set(found.cards)
    judged = seen or (found is other and len(found.cards) > 1)
    sure = sum(found.times > most for most in TIMES) + (not judged)
    return Surety(
        kind=kind,
        word=_WORDS[min(sure, len(_WORDS) - 1)],
        figures=found.figures,
        median=found.median,
        p90=found.p90,
        worst=found.worst,
        seen=seen,
        measured=found.measured,
    )
