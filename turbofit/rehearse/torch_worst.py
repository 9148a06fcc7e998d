"""The worst requests of a model whose engine takes pictures, not units: sizes in pixels."""

from __future__ import annotations

import math

from turbofit.core.errors import UsageError
from turbofit.core.images import AnyresRule, HdRule, ImageRule, PatchRule
from turbofit.core.images.base_tile import BaseTileRule
from turbofit.model.images import image_tokens, units, worst_units
from turbofit.rehearse.torch_spec import LONGEST, TorchCase, TorchRequest

__all__ = ["torch_cases", "worst_size"]

_TEXT = 32  # prompt tokens beside the images, about what a chat template adds
_NEW = 4  # tokens to generate: one forward of prefill, three of decoding
_FRAME = 32  # at most what a chat template adds to that
_MOST_QUEUED = 32
_SHARES = 8  # pictures that are tried in one forward
#: Pixels of the longer side over the shorter: preprocessors refuse more than 200.
_SLIM = 16


def worst_size(
    rule: ImageRule, *, max_dynamic_patch: int | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """A picture (width, height) that gives the most units under the limit, as square as may be.

    Raises:
        UsageError: the limit is above the checkpoint's own, which a picture's size cannot raise.
    """
    if isinstance(rule, BaseTileRule):
        limit, own, name = max_dynamic_patch, rule.max_dynamic_patch, "--max-dynamic-patch"
    else:
        limit, own, name = max_pixels, rule.max_pixels, "--max-pixels"
    limit = own if limit is None else limit
    if limit > own:
        raise UsageError(
            f"{name} {limit} is above the checkpoint's own {own}",
            hint="the rehearsal sends pictures under the checkpoint's own limit; lower it",
        )
    if isinstance(rule, AnyresRule):
        return rule.worst_size(limit)
    if isinstance(rule, HdRule):
        return rule.tile_size, rule.tile_size * limit
    if isinstance(rule, BaseTileRule):
        wanted, edge = worst_units(rule, max_dynamic_patch=limit), rule.tile_size
        cells = max(1, limit if rule.dynamic else 1)
    else:
        wanted, edge = worst_units(rule, max_pixels=limit), rule.patch_size * rule.merge
        cells = max(1, wanted // rule.merge**2)
    best, most = (edge, edge), 0
    for rows in range(math.isqrt(cells), 0, -1):
        columns = cells // rows
        if most and columns > _SLIM * rows and not isinstance(rule, BaseTileRule):
            break
        seen = units(rule, columns * edge, rows * edge)
        if most < seen <= wanted:
            best, most = (columns * edge, rows * edge), seen
        if most >= wanted:
            break
    return best


def torch_cases(
    rule: ImageRule | None,
    size: tuple[int, int] | None,
    *,
    images: int = 1,
    batch: int | None = None,
    prefill: int = 8192,
    text: bool = True,
) -> tuple[TorchCase, ...]:
    """The cases, worst first to last as a server would meet them.

    ``vision_request``: one request with ``images`` pictures. ``vision_forward``: so many of them,
    or of smaller ones that fill it better, queued that one more than fits meets in a forward of
    ``prefill`` tokens. ``text_prefill``: the
    longest prompt. ``sampling``: a full batch with ``top_k=0``.

    Args:
        rule: how pictures become tokens; None where it is not known.
        size: of the pictures; None: no pictures.
        images: a request.
        batch: requests that the engine runs at once; None: it serves one at a time.
        prefill: tokens of one forward.
        text: whether the longest prompt is driven too.
    """
    cases: list[TorchCase] = []
    if size is not None and images:
        one = TorchRequest(_TEXT, (size,) * images, _NEW)
        cases.append(TorchCase("vision_request", one))
        if batch is not None:
            other = _meeting(rule, size, images, batch, prefill)
            many = TorchRequest(_TEXT, (other,) * images, _NEW)
            count = _meet(rule, other, images, batch, prefill)
            cases.append(TorchCase("vision_forward", many, count))
    if text:
        cases.append(TorchCase("text_prefill", TorchRequest(LONGEST, (), _NEW)))
    if batch is not None:
        cases.append(TorchCase("sampling", TorchRequest(16, (), _NEW, top_k=0), batch))
    return tuple(cases)


def _meet(
    rule: ImageRule | None, size: tuple[int, int], images: int, batch: int, prefill: int
) -> int:
    tokens = image_tokens(rule, *size) * images + _TEXT if rule else 576 * images
    return max(1, min(batch, _MOST_QUEUED, prefill // max(1, tokens) + 2))


def _meeting(
    rule: ImageRule | None, size: tuple[int, int], images: int, batch: int, prefill: int
) -> tuple[int, int]:
    """Of pictures up to this one, that of which a forward holds the most units.

    The largest seldom fills a forward: of 3328 tokens each a forward of 4096 takes one, of 1280
    three.
    """
    if not isinstance(rule, (BaseTileRule, PatchRule)):
        return size

    def together(one: tuple[int, int]) -> int:
        tokens = image_tokens(rule, *one) * images + _TEXT + _FRAME
        return max(1, min(batch, _MOST_QUEUED, prefill // tokens)) * images * units(rule, *one)

    most = units(rule, *size)
    if isinstance(rule, BaseTileRule):
        limits = range(1, rule.max_dynamic_patch + 1) if rule.dynamic else ()
        smaller = [worst_size(rule, max_dynamic_patch=n) for n in limits]
    else:
        shares = (prefill // n - _TEXT - _FRAME for n in range(1, min(batch, _SHARES) + 1))
        cells = (share // images for share in shares)
        edge = rule.patch_size * rule.merge
        smaller = [worst_size(rule, max_pixels=n * edge**2) for n in cells
                   if 0 < n * edge**2 <= rule.max_pixels]  # fmt: skip
    return max((size, *(one for one in smaller if units(rule, *one) <= most)), key=together)
