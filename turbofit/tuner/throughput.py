"""The forecast over all engines, limited by the host that prepares their images.

LMDeploy decodes and resizes images, and converts them to numbers, on processor cores, in each
engine's process, with the threads that turbofit gives it. If these are slower than the cards, the
cards wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.plan import HostImages, Throughput, image_threads
from turbofit.core.struct import NA, Struct
from turbofit.core.units import three_digits
from turbofit.tuner.speed import Speed, rates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.images.rule import ImageRule, Size
    from turbofit.core.machine import Machine, Measured
    from turbofit.memory.account import VisionLoad
    from turbofit.tuner.resolved_request import ResolvedRequest

#: The image that `turbofit calibrate` measures: pixels of a photograph, and of its nine tiles.
_REFERENCE: Final = (1920 * 1080, 9 * 448 * 448)


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
        """The basis of the host's rate in words."""
        how = "as measured here" if self.measured else "as on a usual core"
        return f"an image takes {three_digits(self.seconds)} s of one core of the host, {how}"

    def beside(self, of_cards: float) -> HostImages:
        """The rates of the host and of the cards (``of_cards``, images a second), for the plan."""
        return HostImages(
            cores=self.cores,
            seconds_per_image=round(self.seconds, 4),
            images_per_second=round(self.images_per_second, 2),
            gpu_images_per_second=round(of_cards, 2),
            measured=self.measured,
        )


def host_rate(
    request: ResolvedRequest, load: VisionLoad, engines: int, size: Size | None = None
) -> HostRate | None:
    """The host's rate for a load's images, for so many engines of LMDeploy.

    Pictures have the ``size``, or that of the workload; without either, as many pixels as their
    units (too high for larger pictures). None without images, or if the host's cores are unknown.
    The rate is too high if other processes use the cores, too low if images come twice.
    """
    rule, size = request.model.image_rule, size or request.workload.image_size
    if rule is None or not load.units_per_image:
        return None
    picture = Picture(rule, load.units_per_image, size)
    return rate_of_host(request.machine, picture, engines, request.image_threads)


class Picture(NamedTuple):
    """An image of so many units; with ``size`` None, it has as many pixels as its units."""

    rule: ImageRule
    units: int
    size: Size | None = None


def rate_of_host(
    machine: Machine, picture: Picture, engines: int, threads: int | None = None
) -> HostRate | None:
    """A machine's rate for preparing pictures; None if its cores are unknown.

    ``threads`` of each engine prepare them; None means turbofit's choice.
    """
    cores = machine.host.cpus
    if cores == NA:
        return None
    threads = threads or image_threads(int(cores), engines)
    seconds = image_seconds(*picture, by_float=threads == 1)
    measured = machine.measured.image_seconds if machine.measured is not None else 0.0
    if measured:
        photograph, tiles = _REFERENCE
        figures = rates()
        usual = photograph * figures.tile_source_seconds + tiles * figures.tile_prepared_seconds
        seconds *= measured / usual
    busy = min(int(cores), threads * engines)
    return HostRate(cores=busy, seconds=seconds, measured=bool(measured))


def image_seconds(
    rule: ImageRule, units: int, size: Size | None = None, *, by_float: bool = False
) -> float:
    """Seconds of one core for an image of so many units; ``by_float``: LMDeploy's own way.

    A picture without ``size`` has as many pixels as its units.
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


def rate_with_host(of_cards: float, at_once: float, prepared: float, seconds: float) -> float:
    """The requests a second of the cards, limited to the ``prepared`` requests of the host.

    ``of_cards`` is the rate of the cards only, with ``at_once`` requests at any time. While the
    host works on one request's images for ``seconds``, the cards work for others, if there are any.
    """
    return min(prepared, of_cards if at_once > 1 else 1 / (1 / of_cards + seconds))


def with_host(of_cards: float, at_once: float, host: HostRate, images: int) -> tuple[float, float]:
    """The rate with a host that prepares images, and the seconds added to a first token."""
    prepared, seconds = host.images_per_second / images, host.seconds * images
    waits = at_once * max(0.0, 1 / prepared - 1 / of_cards)  # if the host is slower than the cards
    return rate_with_host(of_cards, at_once, prepared, seconds), seconds + waits


def total(
    speeds: Sequence[Speed],
    measured: Measured | None = None,
    *,
    images: int = 0,
    host: HostRate | None = None,
) -> Throughput:
    """The forecast over all replicas; ``measured`` is a basis in addition to the constants.

    A request has ``images``, which the ``host`` prepares; a host of None is unknown and not
    counted.
    """
    figures = rates()
    rests = "rates assumed, not measured"
    if measured is not None and (measured.cards or measured.reduces):
        rests = f"cards and links as measured here with torch {measured.torch}, the rest assumed"
    if images:
        rests += f"; {host.words if host else 'the host is not counted: its cores are not known'}"
    of_cards = rate = sum(speed.requests_per_second for speed in speeds)
    there = sum(speed.requests_per_second * speed.seconds_per_request for speed in speeds)
    seconds = max(speed.seconds_to_first_token for speed in speeds)
    alone = max(speed.alone for speed in speeds)
    prepares = None
    if host is not None and images:
        prepares = host.beside(images * of_cards)
        rate, waits = with_host(of_cards, there, host, images)
        seconds, alone = seconds + waits, alone + host.seconds * images
    return Throughput(
        basis=(
            f"estimate: {figures.text_tokens} text tokens beside the workload's images, "
            f"{figures.output_tokens} answered; {rests}"
        ),
        requests_per_second=round(rate, 4),
        output_tokens_per_second=round(rate * figures.output_tokens, 1),
        concurrent_requests=round(sum(speed.running for speed in speeds)),
        seconds_to_first_token=round(seconds, 3),
        seconds_to_first_token_alone=round(alone, 3),
        host=prepares,
    )
