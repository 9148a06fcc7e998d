"""Builds the worst cases of a plan from prompts whose mixes of images may be the worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from turbofit.core.plan import Limits, Plan
from turbofit.rehearse.spec import RehearsalCase, RehearsalRequest

_ANY: Final = 1 << 40  # tokens


class Image(NamedTuple):
    units: int
    tokens: int


class Prompt(NamedTuple):
    """``lead`` tokens of text, images, and ``rest`` tokens of text; ``length`` is their sum."""

    lead: int
    images: tuple[Image, ...]
    rest: int

    @property
    def units(self) -> int:
        return sum(image.units for image in self.images)

    @property
    def tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    @property
    def length(self) -> int:
        return self.lead + self.tokens + self.rest

    def met(self, start: int, end: int, *, again: bool) -> int:
        """Units of the images that have a token between two places; else the first of theirs."""
        total, at = 0, self.lead
        for units, tokens in self.images:
            if start < at + (tokens if again else 1) and end > at:
                total += units
            at += tokens
        return total


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts that clients may send.

    Attributes:
        image: returns the image with the most units within some units and tokens, or None.
        units: the most units of an image.
        images, request_units: the most images and units of a request.
        step: units by which images differ.
        lead, rest: the fewest tokens of text before and after the images.
    """

    image: Callable[[int, int], Image | None]
    units: int
    images: int
    request_units: int
    step: int = 1
    lead: int = 1
    rest: int = 1

    def prompt(self, units: int, rest: int | None = None) -> Prompt:
        """A prompt with one image of about so many units; ValueError if no image has so few."""
        image = self.image(units, _ANY)
        if image is None:
            raise ValueError(f"no image of {units} units")
        return Prompt(self.lead, (image,), self.rest if rest is None else rest)

    def alone(self, tokens: int, units: int | None = None) -> Prompt | None:
        """A prompt of at most ``tokens`` tokens with one image, the largest possible, or None."""
        room = tokens - self.lead - self.rest
        most = self.units if units is None else min(units, self.units)
        image = self.image(most, room) if room > 0 and most > 0 else None
        return None if image is None else Prompt(self.lead, (image,), self.rest)

    def filled(self, tokens: int, most: int) -> list[Prompt]:
        """Prompts with one image each, of at most ``tokens`` tokens in all, the largest first."""
        prompts: list[Prompt] = []
        while len(prompts) < most and (prompt := self.alone(tokens)):
            prompts.append(prompt)
            tokens -= prompt.length
        return prompts

    def request(self, units: int, context: int, room: int) -> Prompt | None:
        """A request of at most ``units`` units and ``context`` tokens, for one forward, or None.

        ``room``: tokens that are left in the forward, of which the last image needs only one.
        """
        images: list[Image] = []
        context -= self.lead + self.rest
        units = min(units, self.request_units)
        while len(images) < self.images and room > 1 and units >= self.step:
            image = self.image(min(units, self.units), context) if context > 0 else None
            if image is None:
                break
            images.append(image)
            units, context, room = units - image.units, context - image.tokens, room - image.tokens
        return Prompt(self.lead, tuple(images), self.rest) if images else None

    def under(self, prompts: Sequence[Prompt], gate: int, most: int) -> list[Prompt]:
        """The prompts that a gateway lets through together; the last one is made smaller to fit."""
        admitted: list[Prompt] = []
        left, unit = gate, prompts[0].units
        for prompt in prompts:
            if prompt.units > left:
                break
            admitted.append(prompt)
            left -= prompt.units
        while left >= self.step and len(admitted) < most:
            smaller = self.alone(_ANY, min(unit, left))
            if smaller is None:
                break
            admitted.append(smaller)
            left -= smaller.units
        return admitted

    def together(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same images, in requests with as many images as one may have."""
        requests = list(prompts[:1])
        for prompt in prompts[1:]:
            last = requests[-1]
            if len(last.images) < self.images and last.units + prompt.units <= self.request_units:
                requests[-1] = Prompt(last.lead, last.images + prompt.images, prompt.rest)
            else:
                requests.append(prompt)
        return requests


def units_of_request(units: int, images: int, request_units: int) -> list[int]:
    """Units of the images of the worst request: full-size images, and one with the rest."""
    left, shares = request_units, list[int]()
    while left > 0 and len(shares) < images:
        shares.append(min(left, units))
        left -= shares[-1]
    return shares


def let_through(limits: Limits, bound: int) -> int | None:
    """The units that the gateway lets through together; None if all that can meet are paid for."""
    paid = limits.units_per_forward
    return paid if paid < bound else None


def cases_of(
    plan: Plan, images: Mapping[str, Sequence[RehearsalRequest]], longest: int, new: int
) -> tuple[RehearsalCase, ...]:
    """The worst cases of a plan, named like the ledger's transient terms.

    ``vision_request``: one request with as many images as it may have. ``vision_forward``: the
    images, equal or not, that bring the most units into one forward among those that the gateway
    lets through together. ``images`` has the requests of both. ``text_prefill``: one prompt of
    ``longest`` tokens. ``sampling``: a full batch with ``top_k=0``. An engine that serves one
    request at a time has the first and the third case. Each request generates ``new`` tokens.
    """
    cases = {**images, "text_prefill": [RehearsalRequest(longest, max_new_tokens=new)]}
    if plan.engine.of_lmdeploy:
        row = RehearsalRequest(16, max_new_tokens=new, top_k=0)
        cases["sampling"] = [row] * plan.settings.max_batch_size
    return tuple(RehearsalCase(name, tuple(requests)) for name, requests in cases.items())
