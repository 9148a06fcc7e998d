"""One model's gateway behind the address of several: what `GatewayThread` is to a model alone."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from turbofit.core.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread

__all__ = ["AttachedGateway", "insist"]

_LOOK: Final = 0.05
#: Seconds for which a loop may be busy: a server that waits hears no signal.
_BUSY_SECONDS: Final = 60.0
#: Seconds for requests of engines that are gone: each ends as soon as its connection breaks.
_BROKEN_OFF: Final = 60.0

_Answer = TypeVar("_Answer")


def insist(front: GatewayThread[ModelsGateway], ask: Callable[[ModelsGateway], _Answer]) -> _Answer:
    """Run something in the address's loop, which may be busy for a minute.

    Raises:
        LaunchError: the address is not served any more, or its loop hangs.
    """
    return front.call(ask, _BUSY_SECONDS)


class AttachedGateway:
    """A model's gateway, from when its engines are ready to when they end.

    Args:
        front: serves the address.
        model: whose it is.
        gateway: the model's.
    """

    def __init__(
        self, front: GatewayThread[ModelsGateway], model: ServedModel, gateway: Gateway
    ) -> None:
        self._front, self._model, self._gateway = front, model, gateway
        self._task: asyncio.Task[Any] | None = None

    def start(self) -> None:
        """Requests for the model go to its gateway from now on.

        Raises:
            LaunchError: the address is not served any more.
        """

        def begin(_: ModelsGateway) -> None:
            self._task = asyncio.ensure_future(self._gateway.startup())
            self._model.open(self._gateway)

        insist(self._front, begin)

    @property
    def url(self) -> str:
        """The address of all models."""
        return self._front.url

    def call(self, ask: Callable[[Gateway], _Answer]) -> _Answer:
        """Run ``ask(gateway)`` in the loop, and return what it returns.

        Raises:
            LaunchError: the address is not served any more, or its loop is too busy.
        """
        return self._front.call(lambda _: ask(self._gateway))

    @property
    def cut(self) -> int:
        """How many requests of all models the address's end has cut off."""
        return self._front.cut

    def strike(self) -> None:
        """Cut off what the address of all models has under way."""
        self._front.strike()

    def stop(self, *, drain: bool = True) -> None:
        """Give it no request any more, and close it.

        Args:
            drain: wait until what it has has ended, within the drain's seconds.
        """

        def detach(_: ModelsGateway) -> None:
            if self._model.gateway is self._gateway:
                self._model.detach(self._gateway)
                self._task = asyncio.ensure_future(self._close())

        with suppress(LaunchError):  # the address is closed, and its gateways with it
            insist(self._front, detach)
            deadline = time.monotonic() + (self._gateway.config.drain_seconds if drain else 0)
            while self._model.in_flight and time.monotonic() < deadline:
                time.sleep(_LOOK)

    async def _close(self) -> None:
        """Close it once what it has has ended, which its engines' end sees to."""
        deadline = time.monotonic() + self._gateway.config.drain_seconds + _BROKEN_OFF
        while self._model.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        await self._gateway.shutdown()
