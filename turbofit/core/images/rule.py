"""The base of image rules: how images become units of the tower, and tokens of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError, option_of
from turbofit.core.images.video import Videos
from turbofit.core.messages import plural
from turbofit.core.struct import Struct
from turbofit.core.units import bisect

if TYPE_CHECKING:
    from typing_extensions import Self

    from turbofit.core.struct import Options

#: Width and height in pixels.
Size = tuple[int, int]

_REFUSED: Final = 1 << 62
#: A squarer image counts as a worst one if it has this share of the most units.
_NEARLY: Final = 0.97


class DummyImage(NamedTuple):
    """An image for a test request, and LMDeploy's fields that go with it."""

    size: Size
    knobs: dict[str, int]


class FolderEdits(NamedTuple):
    """New values for ``config.json`` and the image processor's file, which lower a folder's limit.

    ``inside``: the key of the processor's file that holds them; empty: they stand at its top.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    inside: str = ""


class Allowed(NamedTuple):
    """The limits that a client's image is lowered to.

    ``planned`` is the plan's limit. ``default`` is the limit of an image without fields if no plan
    lowers it. ``units`` is what the plan counts for an image; an image keeps more only if no lower
    limit helps. ``cap`` is a lower limit, used only for images that it makes smaller.
    """

    planned: int
    default: int
    units: int
    cap: int | None


class Lowered(NamedTuple):
    """LMDeploy's fields for a client's image, its units, and the changes.

    ``changes``: a field's name, the wished value, the value given. If nobody wished a value, the
    default stands for it, provided it would have made more units of the image.
    """

    knobs: dict[str, int]
    units: int
    changes: tuple[tuple[str, object, int], ...]


class ImageRule(Struct):
    """How a model's images become units of its vision tower, and tokens of its language model.

    A unit is a tile or a patch. A limit bounds the units of one image and is counted as LMDeploy
    counts it, in tiles or in pixels; an optional limit of None is the checkpoint's own.

    Tokens are those of the image alone: a chat template wraps each image in two text tokens more
    (``<img>``/``</img>`` or ``<|vision_start|>``/``<|vision_end|>``; InternVL's adds a line feed),
    which belong to the prompt. A 448 x 448 image of InternVL2 is 256 tokens here.

    A rule is one file of this folder, and a member of ``AnyImageRule``.
    """

    #: Names of one unit, and of what a limit counts; used in ``limits.vision_unit``.
    unit_name: ClassVar[Literal["tile", "patch"]]
    limit_unit: ClassVar[Literal["tiles", "pixels"]]
    #: The limit's name in LMDeploy and in the rule's fields, and its name in ``core.plan.Limits``.
    limit_name: ClassVar[Literal["max_dynamic_patch", "max_pixels"]]
    plan_limit_name: ClassVar[Literal["max_dynamic_patch", "max_pixels_per_image"]]
    #: Lower limits whose effect a plan shows, the largest first.
    common_limits: ClassVar[tuple[int, ...]]
    #: Whether the limits are so few that each can be tried for each image of a request.
    few_limits: ClassVar[bool]
    #: Whether the tower's attention spans the whole image, not one tile at a time.
    whole_image: ClassVar[bool] = False
    #: Whether each token has a position in time, height and width (M-RoPE).
    mrope: ClassVar[bool] = False
    #: A worst image longer than this ratio is chosen only if squarer ones have clearly fewer units.
    slim: ClassVar[int]

    @property
    @abstractmethod
    def client_knobs(self) -> bool:
        """Whether LMDeploy reads a limit from the fields of an image in a request."""

    @property
    def units_name(self) -> str:
        """The name of several units."""
        return plural(2, self.unit_name)

    @property
    def checkpoint_limit(self) -> int:
        """The checkpoint's own limit."""
        limit: int = getattr(self, self.limit_name)
        return limit

    @property
    @abstractmethod
    def least_limit(self) -> int:
        """The smallest limit that is worth planning for."""

    @property
    def limit_step(self) -> int:
        """The smallest difference between two limits that counts."""
        return 1

    @property
    def unit_step(self) -> int:
        """The units of an image are a multiple of this; the projector merges as many into one."""
        return 1

    @property
    def varies_by_size(self) -> bool:
        """Whether images of different sizes have different numbers of units."""
        return True

    @property
    def varies_by_limit(self) -> bool:
        """Whether a lower limit leaves images fewer units."""
        return True

    @property
    def exposed_limit(self) -> int:
        """The limit that OpenAI clients can reach on a server that enforces no limit."""
        return self.checkpoint_limit

    @property
    def by_request(self) -> bool:
        """Whether LMDeploy takes one limit for all images of a request, but none for one image."""
        return False

    @property
    def processor_limit(self) -> str | None:
        """The limit's name in a running engine's image processor, if no other place holds it."""
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
        """The side of one (square) unit, in pixels."""

    @property
    def by_table(self) -> bool:
        """Whether LMDeploy itself cuts an image into tiles, with its table of numbers of bytes.

        If not, an image processor of Transformers cuts it.
        """
        return False

    @property
    def videos(self) -> Videos | None:
        """The rule of the model's videos; None if LMDeploy's PyTorch engine takes none."""
        return None

    def units(self, width: int, height: int, limit: int | None = None) -> int:
        """Units of one image of this size, exactly as the preprocessor makes them.

        Raises:
            UsageError: not a size, or one that the preprocessor refuses.
        """
        if width < 1 or height < 1:
            raise UsageError(
                f"an image of {width}x{height} has no pixels", hint="give WIDTHxHEIGHT"
            )
        return self._units(width, height, self.checkpoint_limit if limit is None else limit)

    def worst_units(self, limit: int | None = None) -> int:
        """The most units that any single image has under the limit."""
        return self._worst_units(self.checkpoint_limit if limit is None else limit)

    @abstractmethod
    def _units(self, width: int, height: int, limit: int) -> int:
        """Units of one image under this limit."""

    @abstractmethod
    def _worst_units(self, limit: int) -> int:
        """The most units of one image under this limit."""

    @property
    def least_units(self) -> int:
        """The fewest units that an image may have, under any size and limit."""
        return self.unit_step

    def tokens(self, width: int, height: int, limit: int | None = None) -> int:
        """Tokens of the language model that one image of this size takes, exactly.

        Raises:
            UsageError: not a size, or one that the preprocessor refuses.
        """
        return self.unit_tokens(self.units(width, height, limit))

    def unit_tokens(self, units: int) -> int:
        """Tokens of the language model that an image of so many units takes.

        It is exact if the tokens depend on the units alone. Otherwise it is an upper bound: the
        uncovered parts of a grid or page give no tokens, and :meth:`tokens` is exact.
        """
        return self.features(units)

    @abstractmethod
    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        """The most units of images that have at most so many tokens in all.

        It is an upper bound, too high for grids and pages: an image that covers little has many
        tiles and few tokens. A page is padded to ``padded`` units; None is the checkpoint's number.
        """

    def images_in(self, count: int, tokens: int, most: int) -> tuple[int, int]:
        """Return the units of each of ``count`` equal images, and the tokens of them all.

        They are the largest of at most ``most`` units that together take no more than ``tokens``.
        """
        room, step, units = tokens // count, self.unit_step, most
        if self.unit_tokens(most) > room:
            steps, _ = bisect(
                lambda steps: self.unit_tokens(steps * step) <= room,
                self.least_units // step,
                -(-most // step),
            )
            units = steps * step
        return units, self.unit_tokens(units) * count

    @abstractmethod
    def features(self, units: int) -> int:
        """Rows that tower and projector make of so many units, before padding is removed."""

    @abstractmethod
    def tower_tokens(self, patch_size: int) -> int:
        """Tokens that the tower processes for one unit, if its patches have this side."""

    @abstractmethod
    def unit_values(self, channels: int, temporal_patch: int) -> int:
        """The number of values in one unit's preprocessed pixels."""

    @abstractmethod
    def largest_limit(self, units: int) -> int | None:
        """The largest limit, at most the checkpoint's own, whose worst image has at most ``units``.

        None if no limit is low enough.
        """

    @abstractmethod
    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        """Image limits worth trying, the checkpoint's own first, then lower ones.

        They are numbers of tiles; or numbers of pixels, halved at most ``steps`` times.
        """

    @abstractmethod
    def limits_below(self, most: int) -> range:
        """All limits below ``most`` that images can be lowered to, the smallest first."""

    def with_limit(self, limit: int) -> Self:
        """The rule of a model folder whose own limit is ``limit``."""
        return replace(self, **{self.limit_name: limit}) if self.varies_by_limit else self

    def knobs(self, limit: int) -> dict[str, int]:
        """LMDeploy's fields that hold an image to the limit, even if the default is another one."""
        return {self.limit_name: limit}

    @abstractmethod
    def folder_edits(self, limit: int) -> FolderEdits:
        """The edits that give a model folder this limit as its own."""

    @abstractmethod
    def lower(self, size: Size, options: Options, to: Allowed) -> Lowered:
        """Lower a client's image, with the fields of its request, through LMDeploy's fields.

        Values that LMDeploy would not read are ignored here, too.

        Raises:
            UsageError: a size that the preprocessor refuses.
        """

    def request_bounds(self, options: Options) -> dict[str, int]:
        """The bounds that a request's ``mm_processor_kwargs`` set for each of its images."""
        return {}

    def together(self, knobs: Iterable[Mapping[str, int]]) -> Self:
        """The rule with the tightest of several images' fields, which one request carries."""
        return self

    @property
    def request_knobs(self) -> dict[str, int]:
        """The rule's limit in ``mm_processor_kwargs``, for models that take it for a request."""
        return {}

    @property
    @abstractmethod
    def small_image(self) -> DummyImage:
        """A small image for a test request."""

    @abstractmethod
    def image_of(self, units: int) -> DummyImage | None:
        """An image of so many units; None if no image of this model can be made so."""

    @abstractmethod
    def grid(self, units: int) -> int | list[int]:
        """An image of about so many units as TurboMind takes it: tiles, or a grid (t, h, w)."""

    @abstractmethod
    def _cells(self, limit: int) -> tuple[int, int]:
        """The worst image's tiles or windows, without a thumbnail, and their side in pixels."""

    def worst_size(self, limit: int | None = None) -> Size:
        """The size of an image that has the most units under the limit, as square as possible.

        Except for grids, the size alone keeps an image within the limit: an engine that only knows
        the checkpoint's own limit makes as many units of it.
        """
        limit = self.checkpoint_limit if limit is None else limit
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
        """A size with which an image has as many units, under its own limit, as under a lower one.

        It is for images that no field of a request can limit (InternVL in the Transformers format,
        LLaVA's grids, any model through the Messages API). If no size has so few units, a size with
        somewhat more is returned; None if no size has fewer than the image as it is.

        Raises:
            UsageError: a size that the preprocessor refuses.
        """
        before = self.units(*size)
        if not self.varies_by_size:
            return None
        stretched = self.stretched(size, limit)
        goal = self.with_limit(limit).units(*size) if stretched else self.worst_units(limit)
        if before <= goal:
            return None
        if stretched is None:
            return self._scaled(size, goal)
        if self._count(stretched) <= goal:
            return stretched
        # An image below the least size is enlarged again, so the nearest possible size is taken.
        best = min(filter(None, (stretched, self._scaled(size, goal))), key=self._count)
        return best if self._count(best) < before else None

    def stretched(self, size: Size, limit: int) -> Size | None:
        """The size that the preprocessor itself gives an image under the limit.

        None if it stretches no image: a smaller image of the same shape then has a smaller grid.
        """
        return None

    def _scaled(self, size: Size, goal: int) -> Size | None:
        """The largest size found, of the image's shape, that takes at most ``goal`` units."""
        longer = max(size)

        def at(side: int) -> Size:
            width, height = (-(-edge * side // longer) for edge in size)  # keeps the shape
            return width, height

        side = bisect(lambda side: self._count(at(side)) <= goal, 0, longer + 1)[0]
        return at(side) if side else None

    def _count(self, size: Size) -> int:
        """Units of an image; more than any limit if rounding made it too long."""
        try:
            return self.units(*size)
        except UsageError:
            return _REFUSED
