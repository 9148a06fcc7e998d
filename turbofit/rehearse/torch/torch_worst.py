"""The worst requests of a model whose engine takes pictures, not units: sizes in pixels."""

from __future__ import annotations

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.rehearse.torch.torch_image_overlap import Pictures, ServerRoom, worst_mix
from turbofit.rehearse.torch.torch_spec import LONGEST, TorchCase, TorchRequest

__all__ = ["rehearsed_size", "torch_cases"]

_TEXT = 32  # prompt tokens beside the images, about what a chat template adds
_LEAST_TEXT = 1
_NEW = 4  # tokens to generate: one forward of prefill, three of decoding
_MOST_QUEUED = 32
_UNKNOWN = 576  # tokens of a picture whose rule is not known


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
    request_units: int | None = None,
    room: ServerRoom | None = None,
) -> tuple[TorchCase, ...]:
    """The cases, worst first to last as a server would meet them.

    ``vision_request``: one request with ``images`` pictures. ``vision_forward``: the pictures,
    equal or not, that bring most units into one forward. ``text_prefill``: the longest prompt.
    ``sampling``: a full batch with ``top_k=0``.

    Args:
        rule: how pictures become tokens; None where it is not known.
        size: of the largest picture; None: no pictures.
        images: a request.
        request_units: of all pictures of a request; None: of so many of the largest.
        room: what the engine has room for; None: it serves one request at a time.
    """
    cases: list[TorchCase] = []
    if size is not None and images:
        one = TorchRequest(_TEXT, (size,) * images, _NEW)
        many = _equal(one, room)
        if rule is not None:
            pictures = Pictures(rule, size, images, request_units)
            one = TorchRequest(_TEXT, pictures.sizes(pictures.request()), _NEW)
            many = _mixed(pictures, room)
        cases.append(TorchCase("vision_request", (one,)))
        if many:
            cases.append(TorchCase("vision_forward", many))
    cases.append(TorchCase("text_prefill", (TorchRequest(LONGEST, (), _NEW),)))
    if room is not None:
        row = TorchRequest(16, (), _NEW, top_k=0)
        cases.append(TorchCase("sampling", (row,) * room.batch))
    return tuple(cases)


def _equal(one: TorchRequest, room: ServerRoom | None) -> tuple[TorchRequest, ...]:
    """Equal requests, one more than fit into a forward, where little is known of the images."""
    if room is None:
        return ()
    count = room.prefill // (_UNKNOWN * len(one.images)) + 2
    return (one,) * min(room.batch, _MOST_QUEUED, count)


def _mixed(pictures: Pictures, room: ServerRoom | None) -> tuple[TorchRequest, ...]:
    if room is None:
        return ()
    return tuple(
        # What a prefix cache has seen is not encoded again.
        TorchRequest(
            _LEAST_TEXT, pictures.sizes(prompt), _NEW, shade=i + 1 if room.prefix_caching else 0
        )
        for i, prompt in enumerate(worst_mix(pictures, room))
    )
