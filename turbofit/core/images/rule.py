"""The base of image rules: how images become units of the tower, and tokens of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any, ClassVar, Final, Literal, NamedTuple

from msgspec.structs import replace
from typing_extensions import Self

from turbofit.core.errors import UsageError, option_of
from turbofit.core.images.video import Videos
from turbofit.core.messages import plural
from turbofit.core.struct import Options, Struct
from turbofit.core.units import bisect

#: Width and height in pixels.
Size = tuple[int, int]
#: The most pixels of an image, about 256 MiB after decoding; Pillow warns above this number.
LARGEST_PIXELS: Final = 89_478_485
#: The longest side of an image in pixels, as in JPEG; longer sides only serve attacks.
LONGEST_SIDE: Final = 65_535

_REFUSED: Final = 1 << 62
#: A squarer image may replace the worst image if the squarer image has this share of the most
#: units.
_NEARLY: Final = 0.97


class DummyImage(NamedTuple):
    """An image's size for a test request, in pixels.

    With the fields ``knobs``, LMDeploy does not resize the image.
    """

    size: Size
    knobs: dict[str, int]


class FolderEdits(NamedTuple):
    """New values for ``config.json`` and the image processor's file, to change a folder's limit.

    ``inside`` is the key of the values in the processor's file; empty for the top level.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    inside: str = ""


class Allowed(NamedTuple):
    """The limits that a client's image is lowered to.

    ``planned`` is the plan's limit. ``default`` is the limit of images without a client's limit.
    ``units`` are the units that the plan counts for an image; an image has more units only if no
    limit is low enough. ``cap`` is one more, lower limit: it holds for an image only if the image
    then has fewer units.
    """

    planned: int
    default: int
    units: int
    cap: int | None


class Lowered(NamedTuple):
    """LMDeploy's fields for a client's image, the image's units, and what was lowered.

    Each of ``changes`` is a field's name, the client's value, and the value for LMDeploy. If the
    client sent no value, but the default would give more than ``units``, the default stands in
    place of the client's value.
    """

    knobs: dict[str, int]
    units: int
    changes: tuple[tuple[str, object, int], ...]


class ImageRule(Struct):
    """How a model's images become units of its vision tower, and tokens of its language model.

    A unit is a tile or a patch. A limit bounds the units of one image, and is a number of tiles or
    of pixels, as in LMDeploy. A limit of None is the checkpoint's own limit.

    Tokens are tokens of the image alone: a 448 x 448 image of InternVL2 has 256 tokens. The prompt
    has two more tokens for each image, from the chat template: ``<img>`` and ``</img>``, or
    ``<|vision_start|>`` and ``<|vision_end|>``; InternVL's template adds a line feed.

    Each rule has a file in this folder and is a member of ``AnyImageRule``.
    """

    #: The name of one vision unit, as in ``limits.vision_unit``.
    unit_name: ClassVar[Literal["tile", "patch"]]
    #: The unit in which image limits are counted.
    limit_unit: ClassVar[Literal["tiles", "pixels"]]
    #: The limit's name in LMDeploy and in the rule's fields.
    limit_name: ClassVar[Literal["max_dynamic_patch", "max_pixels"]]
    #: The limit's name in ``core.plan.Limits``.
    plan_limit_name: ClassVar[Literal["max_dynamic_patch", "max_pixels_per_image"]]
    #: Lower limits; a plan shows the effect of each. The largest limit is the first.
    common_limits: ClassVar[tuple[int, ...]]
    #: Whether the gateway can try all limits for each image of a request, because limits are few.
    few_limits: ClassVar[bool]
    #: Whether the tower's attention spans the whole image, not one tile at a time.
    whole_image: ClassVar[bool] = False
    #: Whether each token has a position in time, height and width (M-RoPE).
    mrope: ClassVar[bool] = False
    #: The longest shape (long side / short side) of a usual worst image. A longer image is chosen
    #: only if squarer images have clearly fewer units.
    slim: ClassVar[int]

    @property
    @abstractmethod
    def client_knobs(self) -> bool:
        """Whether LMDeploy reads a limit from the fields of an image in a request."""

    @property
    def units_name(self) -> str:
        """The plural of the unit's name: ``tiles`` or ``patches``."""
        return plural(2, self.unit_name)

    @property
    def checkpoint_limit(self) -> int:
        """The checkpoint's own image limit, in tiles or pixels."""
        limit: int = getattr(self, self.limit_name)
        return limit

    @property
    @abstractmethod
    def least_limit(self) -> int:
        """The smallest image limit that a plan tries, in tiles or pixels."""

    @property
    def limit_step(self) -> int:
        """The smallest change of an image limit that can change the units, in tiles or pixels."""
        return 1

    @property
    def unit_step(self) -> int:
        """The number of units that the projector merges.

        An image's units are a multiple of this number.
        """
        return 1

    @property
    def varies_by_size(self) -> bool:
        """Whether images of different sizes have different numbers of units."""
        return True

    @property
    def varies_by_limit(self) -> bool:
        """Whether a lower image limit gives an image fewer units."""
        return True

    @property
    def exposed_limit(self) -> int:
        """The highest image limit that OpenAI clients can set on a server without a gateway."""
        return self.checkpoint_limit

    @property
    def by_request(self) -> bool:
        """Whether LMDeploy takes a limit only for all images of a request, not for each image."""
        return False

    @property
    def processor_limit(self) -> str | None:
        """The name of the limit in a running engine's image processor.

        None if the processor does not need the limit.
        """
        return None

    @property
    def limit_option(self) -> str:
        """The command-line option that sets the limit."""
        return option_of(self.limit_name)

    @property
    @abstractmethod
    def summary(self) -> str:
        """The checkpoint's own limit in one or two words."""

    @property
    @abstractmethod
    def unit_side(self) -> int:
        """The side of a unit, which is a square, in pixels."""

    @property
    def by_table(self) -> bool:
        """Whether LMDeploy's own code cuts images into tiles and converts pixels by a table.

        Otherwise an image processor of Transformers cuts and converts.
        """
        return False

    @property
    def videos(self) -> Videos | None:
        """The rule for the model's videos; None if LMDeploy takes no videos for this model."""
        return None

    def units(self, width: int, height: int, limit: int | None = None) -> int:
        """Return the units that the preprocessor makes of one image of this size.

        Raises:
            UsageError: a side has no pixel, or the preprocessor refuses the size.
        """
        if width < 1 or height < 1:
            raise UsageError(
                f"an image of {width}x{height} has no pixels", hint="give WIDTHxHEIGHT"
            )
        return self._units(width, height, self.checkpoint_limit if limit is None else limit)

    def worst_units(self, limit: int | None = None) -> int:
        """Return the most units of any single image under the limit."""
        return self._worst_units(self.checkpoint_limit if limit is None else limit)

    @abstractmethod
    def _units(self, width: int, height: int, limit: int) -> int:
        """Return the units of one image under this limit."""

    @abstractmethod
    def _worst_units(self, limit: int) -> int:
        """Return the most units of one image under this limit."""

    @property
    def least_units(self) -> int:
        """The fewest units that an image may have, under any size and limit."""
        return self.unit_step

    def tokens(self, width: int, height: int, limit: int | None = None) -> int:
        """Return the exact number of the language model's tokens for one image of this size.

        Raises:
            UsageError: a side has no pixel, or the preprocessor refuses the size.
        """
        return self.unit_tokens(self.units(width, height, limit))

    def unit_tokens(self, units: int) -> int:
        """Return the language model's tokens for an image of ``units``.

        The number is exact if tokens depend on the units alone. In rules with grids or pages the
        number is an upper bound: parts of a grid without the image give no tokens. :meth:`tokens`
        is always exact.
        """
        return self.features(units)

    @abstractmethod
    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        """Return an upper bound of the units of images that have at most ``tokens`` in all.

        Rules with grids or pages return too many units: an image that covers little of its grid or
        page has many tiles and few tokens. A page is padded to ``padded`` units, by default the
        checkpoint's own number.
        """

    def images_in(self, count: int, tokens: int, most: int) -> tuple[int, int]:
        """Return the units of each of ``count`` equal images, and the tokens of all these images.

        The images are as large as possible: each has at most ``most`` units, and all images
        together have at most ``tokens``.
        """
        tokens_each, step, units = tokens // count, self.unit_step, most
        if self.unit_tokens(most) > tokens_each:
            steps, _ = bisect(
                lambda steps: self.unit_tokens(steps * step) <= tokens_each,
                self.least_units // step,
                -(-most // step),
            )
            units = steps * step
        return units, self.unit_tokens(units) * count

    @abstractmethod
    def features(self, units: int) -> int:
        """Return the number of vectors that tower and projector make of ``units``.

        The number includes vectors of padding; the engine removes these vectors later.
        """

    @abstractmethod
    def tower_tokens(self, patch_size: int) -> int:
        """Return the tower's tokens for one unit.

        ``patch_size`` is the side of the tower's patches in pixels.
        """

    @abstractmethod
    def unit_values(self, channels: int, temporal_patch: int) -> int:
        """Return the number of values in one unit's preprocessed pixels."""

    @abstractmethod
    def largest_limit(self, units: int) -> int | None:
        """Return the largest limit whose worst image has at most ``units``.

        The result is at most the checkpoint's own limit, or None if no limit is low enough.
        """

    @abstractmethod
    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        """Return the image limits that a plan tries: the checkpoint's own, then lower limits.

        Limits in pixels are halved at most ``steps`` times.
        """

    @abstractmethod
    def limits_below(self, most: int) -> range:
        """Return the image limits below ``most`` that are worth a trial, the smallest first."""

    def with_limit(self, limit: int) -> Self:
        """Return the rule of a model folder whose default image limit is ``limit``."""
        return replace(self, **{self.limit_name: limit}) if self.varies_by_limit else self

    def knobs(self, limit: int) -> dict[str, int]:
        """Return the fields of a request to LMDeploy that set an image's limit to ``limit``."""
        return {self.limit_name: limit}

    @abstractmethod
    def folder_edits(self, limit: int) -> FolderEdits:
        """Return the edits of a model folder that make ``limit`` its default image limit."""

    @abstractmethod
    def lower(self, size: Size, options: Options, to: Allowed) -> Lowered:
        """Return LMDeploy's fields that lower a client's image to the allowed limits.

        ``size`` is the size of the image in pixels. ``options`` are the client's fields for the
        image; values that LMDeploy does not read are ignored.

        Raises:
            UsageError: the preprocessor refuses the size.
        """

    def request_bounds(self, options: Options) -> dict[str, int]:
        """Return the bounds that a request's ``mm_processor_kwargs`` set for each of its images."""
        return {}

    def together(self, knobs: Iterable[Mapping[str, int]]) -> Self:
        """Return the rule with the tightest bounds of all images of a request.

        ``knobs`` are LMDeploy's fields for each image.
        """
        return self

    @property
    def request_knobs(self) -> dict[str, int]:
        """The rule's limit as ``mm_processor_kwargs`` of a request.

        Empty unless LMDeploy takes the limit only for a whole request.
        """
        return {}

    @property
    @abstractmethod
    def small_image(self) -> DummyImage:
        """A small image for a test request."""

    def image_of(self, units: int) -> DummyImage | None:
        """Return an image of ``units`` for tests; None if the rule cannot make this image."""
        return None

    @abstractmethod
    def grid(self, units: int) -> int | list[int]:
        """Return the shape of an image of about ``units`` in TurboMind's form.

        The shape is a number of tiles, or the time, height and width of a grid in patches.
        """

    @abstractmethod
    def _cells(self, limit: int) -> tuple[int, int]:
        """Return the number of cells of the worst image, and the side of a cell in pixels.

        A cell is a tile or a window. The tile of the whole image does not count.
        """

    def worst_size(self, limit: int | None = None) -> Size:
        """Return the size of an image with the most units under the limit, as square as possible.

        An engine that still has the checkpoint's own limit makes the same number of units of this
        image. This does not hold for the rules that override the method.
        """
        limit = self.checkpoint_limit if limit is None else limit
        # A lower limit need not have reached the engine; a higher limit must have.
        served = self if limit <= self.checkpoint_limit else self.with_limit(limit)
        wanted, (cells, edge) = self.worst_units(limit), self._cells(limit)
        best, most = (edge, edge), 0
        for rows in range(isqrt(cells), 0, -1):
            columns = cells // rows
            if columns > self.slim * rows and most >= _NEARLY * wanted:
                break
            size = columns * edge, rows * edge
            units = served._count(size)
            if most < units <= wanted:
                best, most = size, units
            if most >= wanted:
                break
        return best

    def size_within(self, size: Size, limit: int) -> Size | None:
        """Return a smaller size at which an image keeps the image limit.

        No field of a request can limit the images of some models and APIs: InternVL in the
        Transformers format, LLaVA's grids, all models through the Messages API. If no size keeps
        the limit, the size with the fewest units is returned. None if the image already keeps the
        limit, or if no size has fewer units.

        Raises:
            UsageError: the preprocessor refuses the size.
        """
        before = self.units(*size)
        if not self.varies_by_size:
            return None
        stretched = self.stretched(size, limit)
        # A stretched image can reach its own units under the limit, any other image the most units.
        goal = self.with_limit(limit).units(*size) if stretched else self.worst_units(limit)
        if before <= goal:
            return None
        if stretched is None:
            return self._scaled(size, goal)
        if self._count(stretched) <= goal:
            return stretched
        # An image below the least size is enlarged again, so take the size with the fewest units.
        best = min(filter(None, (stretched, self._scaled(size, goal))), key=self._count)
        return best if self._count(best) < before else None

    def stretched(self, size: Size, limit: int) -> Size | None:
        """Return the size to which the preprocessor stretches an image under the limit.

        None if the preprocessor stretches no images. A smaller image of the same shape then has
        fewer units.
        """
        return None

    def _scaled(self, size: Size, goal: int) -> Size | None:
        """Return the largest size of the image's shape with at most ``goal`` units; else None."""
        longer = max(size)

        def resized(side: int) -> Size:
            # Both sides by one factor, rounded up, so that the image keeps its shape.
            width, height = (-(-edge * side // longer) for edge in size)
            return width, height

        side = bisect(lambda side: self._count(resized(side)) <= goal, 0, longer + 1)[0]
        return resized(side) if side else None

    def _count(self, size: Size) -> int:
        """Return the units of an image; `_REFUSED`, a huge number, if the size is refused."""
        try:
            return self.units(*size)
        except UsageError:
            return _REFUSED
