"""What every image rule answers: how images become units of the tower, and tokens of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images.video import Videos
from turbofit.core.messages import option_of
from turbofit.core.struct import Struct
from turbofit.core.units import bisect

if TYPE_CHECKING:
    from typing_extensions import Self

    from turbofit.core.json_types import Options

#: Width and height in pixels.
Size = tuple[int, int]

_REFUSED: Final = 1 << 62
#: Share of the most units with which a squarer image is as bad.
_NEARLY: Final = 0.97


class DummyImage(NamedTuple):
    """An image for a test request, and LMDeploy's fields beside it."""

    size: Size
    knobs: dict[str, int]


class FolderEdits(NamedTuple):
    """Values that lower a model folder's own limit: of ``config.json``, of the image processor.

    ``inside``: the key of the processor's file under which they are, where not at its top.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    inside: str = ""


class Allowed(NamedTuple):
    """What a client's image is lowered to.

    ``planned`` is the plan's limit, ``default`` that of an image without fields where no plan
    lowers it, ``units`` what the plan paid for an image: more are left only where nothing helps.
    ``cap``: a limit below the planned one, which holds only for images that it makes smaller.
    """

    planned: int
    default: int
    units: int
    cap: int | None


class Lowered(NamedTuple):
    """LMDeploy's fields for a client's image, its units, and what was changed.

    ``changes``: a field's name, the value that was asked for, the value that is given. Where no
    value was asked for it is the default's, if that would have made more units of the image.
    """

    knobs: dict[str, int]
    units: int
    changes: tuple[tuple[str, object, int], ...]


class ImageRule(Struct):
    """How a model's images become units of its vision tower, and tokens of its language model.

    A unit is a tile or a patch. A limit bounds the units of one image and is given as LMDeploy has
    it, in tiles or in pixels; where it may be None, that is the checkpoint's own.

    Tokens are those of the image alone: a chat template wraps each image in two text tokens more
    (``<img>``/``</img>`` or ``<|vision_start|>``/``<|vision_end|>``; InternVL's adds a line feed),
    which belong to the prompt. A 448 x 448 image of InternVL2 is 256 tokens here.

    A rule is one file of this folder, and a member of ``AnyImageRule``.
    """

    #: A unit, several of them, and what a limit counts, in messages and ``limits.vision_unit``.
    unit_name: ClassVar[Literal["tile", "patch"]]
    units_name: ClassVar[Literal["tiles", "patches"]]
    limit_unit: ClassVar[Literal["tiles", "pixels"]]
    #: The limit's name to LMDeploy and among the rule's fields, and that in ``core.plan.Limits``.
    limit_name: ClassVar[Literal["max_dynamic_patch", "max_pixels"]]
    plan_limit_name: ClassVar[Literal["max_dynamic_patch", "max_pixels_per_image"]]
    #: Lower limits whose cost a plan tells, the largest first.
    common_limits: ClassVar[tuple[int, ...]]
    #: Whether there are few limits, so that each can be tried for each image of a request.
    few_limits: ClassVar[bool]
    #: Whether the tower's attention is over a whole image, not over one tile at a time.
    whole_image: ClassVar[bool] = False
    #: Whether each token has a position in time, height and width (M-RoPE).
    mrope: ClassVar[bool] = False
    #: The worst image is longer than so many heights only where squarer ones have clearly less.
    slim: ClassVar[int]

    @property
    @abstractmethod
    def client_knobs(self) -> bool:
        """Whether LMDeploy reads a limit from the fields of an image in a request."""

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
        """Limits that differ by less are the same limit."""
        return 1

    @property
    def unit_step(self) -> int:
        """Units come in multiples of this, which the projector takes as one."""
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
        """The limit that ordinary OpenAI clients can reach on a server that enforces none."""
        return self.checkpoint_limit

    @property
    def by_request(self) -> bool:
        """Whether LMDeploy takes a limit for all images of a request, and for none alone."""
        return False

    @property
    def processor_limit(self) -> str | None:
        """The limit's name in a running engine's image processor, where nothing else holds it."""
        return None

    @property
    def unmade_units(self) -> int:
        """A number of units that no image has; 0 where there is none."""
        return 0

    @property
    def limit_option(self) -> str:
        """The limit on the command line."""
        return option_of(self.limit_name)

    @property
    @abstractmethod
    def summary(self) -> str:
        """The checkpoint's own limit in a word or two."""

    @property
    @abstractmethod
    def unit_side(self) -> int:
        """Pixels of a unit's side; a unit is square."""

    @property
    def by_table(self) -> bool:
        """Whether LMDeploy makes an image's tiles itself, where a table makes numbers of bytes.

        Else an image processor of Transformers does.
        """
        return False

    @property
    def videos(self) -> Videos | None:
        """The model's videos; None where LMDeploy's PyTorch engine takes none."""
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
    def _units(self, width: int, height: int, limit: int) -> int: ...

    @abstractmethod
    def _worst_units(self, limit: int) -> int: ...

    @property
    def least_units(self) -> int:
        """Units that no image has fewer of, whatever its size and limit."""
        return self.unit_step

    def tokens(self, width: int, height: int, limit: int | None = None) -> int:
        """Tokens of the language model that one image of this size takes, exactly.

        Raises:
            UsageError: not a size, or one that the preprocessor refuses.
        """
        return self.unit_tokens(self.units(width, height, limit))

    def unit_tokens(self, units: int) -> int:
        """Tokens of the language model that an image of so many units takes.

        Exact where tokens go by units alone. Otherwise never under: what an image does not cover of
        its grid or page gives none, and :meth:`tokens` is exact.
        """
        return self.features(units)

    @abstractmethod
    def units_within(self, tokens: int, *, padded: int | None = None) -> int:
        """The most units of any images whose tokens are at most so many in all.

        Never under. For grids and pages far over: an image that covers little has many tiles and
        few tokens. A page is ``padded`` to so many units; None is the checkpoint's own.
        """

    def units_in(self, tokens: int, most: int) -> int:
        """Whole units, up to ``most``, of the largest image that takes no more than the tokens."""
        if self.unit_tokens(most) <= tokens:
            return most
        step = self.unit_step
        steps, _ = bisect(
            lambda steps: self.unit_tokens(steps * step) <= tokens,
            self.least_units // step,
            -(-most // step),
        )
        return steps * step

    @abstractmethod
    def features(self, units: int) -> int:
        """Rows that tower and projector make of so many units, before any padding is cut off."""

    @abstractmethod
    def tower_tokens(self, patch_size: int) -> int:
        """Tokens that the tower runs on for one unit, where its patches have this side."""

    @abstractmethod
    def unit_values(self, channels: int, temporal_patch: int) -> int:
        """Values of one unit's preprocessed pixels."""

    @abstractmethod
    def largest_limit(self, units: int) -> int | None:
        """The largest limit, no more than the checkpoint's own, whose worst image is within units.

        None where there is none.
        """

    @abstractmethod
    def lower_limits(self, steps: int = 16) -> tuple[int, ...]:
        """Limits worth trying, the checkpoint's own first: tile counts, or ``steps`` halves."""

    @abstractmethod
    def limits_below(self, most: int) -> range:
        """Every limit below this one that images can be lowered to, the smallest first."""

    def with_limit(self, limit: int) -> Self:
        """The rule of a model folder whose own limit is this."""
        return replace(self, **{self.limit_name: limit}) if self.varies_by_limit else self

    def knobs(self, limit: int) -> dict[str, int]:
        """LMDeploy's fields of an image that hold it to the limit, whatever its default."""
        return {self.limit_name: limit}

    @abstractmethod
    def folder_edits(self, limit: int) -> FolderEdits:
        """What makes the limit a model folder's own."""

    @abstractmethod
    def lower(self, size: Size, options: Options, to: Allowed) -> Lowered:
        """A client's image with the fields that it asks for, lowered through LMDeploy's fields.

        Values that LMDeploy would not read are not obeyed either.

        Raises:
            UsageError: a size that the preprocessor refuses.
        """

    def request_bounds(self, options: Options) -> dict[str, int]:
        """What a request's ``mm_processor_kwargs`` ask of all its images, as fields of one."""
        return {}

    def together(self, knobs: Iterable[Mapping[str, int]]) -> Self:
        """The rule under the tightest of several images' fields, as one request carries it."""
        return self

    @property
    def request_knobs(self) -> dict[str, int]:
        """Its own limit in ``mm_processor_kwargs``, where LMDeploy takes it :meth:`by_request`."""
        return {}

    @property
    @abstractmethod
    def small_image(self) -> DummyImage:
        """A small image."""

    @abstractmethod
    def image_of(self, units: int) -> DummyImage | None:
        """An image of so many units, as many as wanted; None where images cannot be made so."""

    @abstractmethod
    def grid(self, units: int) -> int | list[int]:
        """An image of about so many units as TurboMind takes it: tiles, or a grid (t, h, w)."""

    @abstractmethod
    def _cells(self, limit: int) -> tuple[int, int]:
        """Tiles or windows of the worst image, a thumbnail aside, and the pixels of their side."""

    def worst_size(self, limit: int | None = None) -> Size:
        """Size of an image that has the most units under the limit, as square as may be.

        Its size alone keeps it to the limit, but for grids: an engine that only knows the
        checkpoint's own limit makes as many units of it.
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
        """Size with which an image takes, under its own limit, what it would take under a lower.

        For images that no field of a request can hold down (InternVL in the Transformers format,
        LLaVA's grids, any model through the Messages API). Where no size takes as little, one that
        takes somewhat more; None where none takes less than the image as it is.

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
        # What is below the least size is enlarged again: the nearest that is to be had.
        best = min(filter(None, (stretched, self._scaled(size, goal))), key=self._count)
        return best if self._count(best) < before else None

    def stretched(self, size: Size, limit: int) -> Size | None:
        """The size that the preprocessor itself gives an image under the limit.

        None where it stretches none: a smaller image of the same shape then has a smaller grid.
        """
        return None

    def _scaled(self, size: Size, goal: int) -> Size | None:
        """The largest size found of the image's own shape that takes no more than ``goal``."""
        longer = max(size)

        def at(side: int) -> Size:
            width, height = (-(-edge * side // longer) for edge in size)  # never a longer shape
            return width, height

        side = bisect(lambda side: self._count(at(side)) <= goal, 0, longer + 1)[0]
        return at(side) if side else None

    def _count(self, size: Size) -> int:
        """Units of an image; more than any limit where rounding made it too long a strip."""
        try:
            return self.units(*size)
        except UsageError:
            return _REFUSED
