"""The worst requests of a model whose engine takes pictures, not units: sizes in pixels."""

from __future__ import annotations

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.rehearse.torch.torch_spec import LONGEST, TorchCase, TorchRequest

__all__ = ["rehearsed_size", "torch_cases"]

_TEXT = 32  # prompt tokens beside the images, about what a chat template adds
_NEW = 4  # tokens to generate: one forward of prefill, three of decoding
_FRAME = 32  # at most what a chat template adds to that
_MOST_QUEUED = 32
_SHARES = 8  # pictures that are tried in one forward


def rehearsed_size(rule: ImageRule, limit: int | None) -> tuple[int, int]:
    """A picture (width, height) that gives the most units under the limit, as square as may be.

    Raises:
        UsageError: the limit is above the checkpoint's own, which a picture's size cannot raise.
    """
    checkpoint_limit = rule.checkpoint_limit
    if limit is not None and limit > checkpoint_limit:
        raise UsageError(
            f"{rule.limit_option} {limit} is above the checkpoint's own {checkpoint_limit}",
            hint="the rehearsal sends pictures under the checkpoint's own limit; lower it",
        )
    return rule.worst_size(limit)


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
    tokens = rule.tokens(*size) * images + _TEXT if rule else 576 * images
    return max(1, min(batch, _MOST_QUEUED, prefill // max(1, tokens) + 2))


def _meeting(
    rule: ImageRule | None, size: tuple[int, int], images: int, batch: int, prefill: int
) -> tuple[int, int]:
    """Of pictures up to this one, that of which a forward holds the most units.

    The largest seldom fills a forward: of 3328 tokens each a forward of 4096 takes one, of 1280
    three.
    """
    if rule is None:
        return size

    def together(one: tuple[int, int]) -> int:
        tokens = rule.tokens(*one) * images + _TEXT + _FRAME
        return max(1, min(batch, _MOST_QUEUED, prefill // tokens)) * images * rule.units(*one)

    most = rule.units(*size)
    shares = (prefill // n - _TEXT - _FRAME for n in range(1, min(batch, _SHARES) + 1))
    limits = rule.limits_for(share // images for share in shares)
    smaller = (rule.worst_size(limit) for limit in limits)
    return max((size, *(one for one in smaller if rule.units(*one) <= most)), key=together)
