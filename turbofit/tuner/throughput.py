"""The forecast over all engines, and the host that prepares their images.

LMDeploy decodes and resizes images, and makes numbers of them, on processor cores, in each engine's
process, with the threads that turbofit gives it. Where they are slower than the cards, the cards
wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.plan import HostImages, Throughput, image_threads
from turbofit.core.struct import NA, Struct
from turbofit.core.units import three_digits
from turbofit.tuner.speed import Speed, rates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.images.rule import Size
    from turbofit.core.machine import Measured
    from turbofit.memory.account import VisionLoad
    from turbofit.tuner.resolved_request import ResolvedRequest

#: What `turbofit machine --measure` prepares: pixels of a photograph, and of its nine tiles.
_REFERENCE: Final = (1920 * 1080, 9 * 448 * 448)


class HostRate(Struct):
    """``cores`` that prepare images, each in ``seconds`` of one of them.

    ``measured``: these are this host's.
    """

    cores: int
    seconds: float
    measured: bool = False

    @property
    def images_per_second(self) -> float:
        return self.cores / self.seconds

    @property
    def words(self) -> str:
        """What a forecast rests on."""
        how = "as measured here" if self.measured else "as on a usual core"
        return f"an image takes {three_digits(self.seconds)} s of one core of the host, {how}"

    def beside(self, of_cards: float) -> HostImages:
        """Beside the images a second that the cards take."""
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
    """How fast the host prepares a load's images for so many engines of LMDeploy.

    Pictures have the ``size``, or the workload's; where there is none, as many pixels as their
    units have (over for larger pictures). None is the answer without images, and where nobody knows
    the host's cores. Over: other processes take nothing of them, and one thread (LMDeploy's own
    way) looks no values up. Under: no image comes twice.
    """
    machine, rule = request.machine, request.model.image_rule
    cores = machine.host.cpus
    if rule is None or cores == NA or not load.units_per_image:
        return None
    prepared, figures = load.units_per_image * rule.unit_side**2, rates()
    size = size or request.workload.image_size
    pixels = prepared if size is None else size[0] * size[1]
    source, given = figures.processor_source_seconds, figures.processor_prepared_seconds
    if rule.by_table:
        source, given = figures.tile_source_seconds, figures.tile_prepared_seconds
    seconds = pixels * source + prepared * given
    measured = machine.measured.image_seconds if machine.measured is not None else 0.0
    if measured:
        photograph, tiles = _REFERENCE
        usual = photograph * figures.tile_source_seconds + tiles * figures.tile_prepared_seconds
        seconds *= measured / usual
    threads = request.image_threads or image_threads(int(cores), engines)
    busy = min(int(cores), threads * engines)
    return HostRate(cores=busy, seconds=seconds, measured=bool(measured))


def total(
    speeds: Sequence[Speed],
    measured: Measured | None = None,
    *,
    images: int = 0,
    host: HostRate | None = None,
) -> Throughput:
    """The forecast over all replicas; ``measured`` is what it rests on beside the constants.

    A request has so many ``images``, which the ``host`` prepares; None is a host that nobody knows,
    and that does not count. While it is slower than the cards, requests wait for it before their
    first token.
    """
    figures = rates()
    rests = "rates assumed, not measured"
    if measured is not None and (measured.cards or measured.reduces):
        rests = f"cards and links as measured here with torch {measured.torch}, the rest assumed"
    if images:
        rests += f"; {host.words if host else 'the host is not counted: its cores are not known'}"
    errors = (
        f"median error {figures.median_error:.1%}, p90 {figures.p90_error:.1%} over "
        f"{figures.error_figures} published figures of text models on {figures.error_cards} cards, "
        f"no figure of a vision model is published"
    )
    of_cards = rate = sum(speed.requests_per_second for speed in speeds)
    seconds = max(speed.seconds_to_first_token for speed in speeds)
    prepares = None
    if host is not None and images:
        prepares = host.beside(images * of_cards)
        rate = min(of_cards, host.images_per_second / images)
        there = sum(speed.requests_per_second * speed.seconds_per_request for speed in speeds)
        seconds += there * (1 / rate - 1 / of_cards)
    return Throughput(
        basis=(
            f"estimate: {figures.text_tokens} text tokens beside the workload's images, "
            f"{figures.output_tokens} answered; {rests}; {errors}"
        ),
        requests_per_second=round(rate, 4),
        output_tokens_per_second=round(rate * figures.output_tokens, 1),
        concurrent_requests=round(sum(speed.running for speed in speeds)),
        seconds_to_first_token=round(seconds, 3),
        median_error=round(figures.median_error, 3),
        host=prepares,
    )
