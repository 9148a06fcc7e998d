"""One model of several: its engines run in a thread of their own, or do not run."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.gateway.models.served_model import AttachedGateway
from turbofit.launch.serve.supervisor import StopSignal

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.run import PublicSide

    #: Plans, launches and follows until the signal ends it.
    Launcher = Callable[[StopSignal, Callable[[Gateway], PublicSide]], object]

__all__ = ["ModelRun"]


class _RunThread(threading.Thread):
    """One run, from its plan to its end."""

    def __init__(self, name: str, launch: Callable[[], object]) -> None:
        super().__init__(name=f"model {name}", daemon=True)
        self._launch = launch
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until it has ended, however."""
        try:
            self._launch()
        except BaseException as exc:  # noqa: BLE001 - it is raised again, or told to clients
            self.error = exc
        finally:
            self.ended.set()


class ModelRun:
    """A model's engines, from one start to the next.

    Args:
        model: what clients see of it.
        weight_bytes: of its checkpoint, by which a start that was not measured yet is forecast.
        launch: one run: plans anew from what is free, launches, and follows.
        front: serves the address of all models.
    """

    def __init__(
        self,
        model: ServedModel,
        weight_bytes: int,
        launch: Launcher,
        front: GatewayThread[ModelsGateway],
    ) -> None:
        self.model, self.weight_bytes = model, weight_bytes
        self._launch, self._front = launch, front
        self._thread: _RunThread | None = None
        self._stop = StopSignal()

    @property
    def running(self) -> bool:
        """Whether it holds memory, or may."""
        return self._thread is not None

    @property
    def ending(self) -> bool:
        """Whether its engines were told to end."""
        return self._thread is not None and self._stop.signal is not None

    def start(self) -> None:
        """Start its engines; `ended` tells when they have ended."""
        self._stop = stop = StopSignal()
        publish = partial(AttachedGateway, self._front, self.model)
        thread = _RunThread(self.model.name, lambda: self._launch(stop, publish))
        self._thread = thread
        thread.start()

    def end(self, number: signal.Signals | None = None) -> None:
        """End its engines in order; their memory is back when `ended` says so."""
        if number is None:
            self._stop.end()
        else:
            self._stop.end(number)

    def strike(self) -> None:
        """End them at once; takes no lock."""
        if self._thread is not None:
            self._stop.strike()

    def ended(self) -> bool:
        """Whether the run that was started has ended in order; the next one may be started.

        Raises:
            TurbofitError: it ended otherwise.
        """
        thread = self._thread
        if thread is None or not thread.ended.is_set():
            return False
        self._thread = None
        if isinstance(thread.error, TurbofitError):
            raise thread.error
        if thread.error is not None:
            raise RuntimeError(f"the run of {self.model.name} failed") from thread.error
        if self._stop.signal is None:
            raise LaunchError(f"{self.model.name} ended by itself", hint="see its run's folder")
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for the run's end, at most so long; whether it has ended."""
        return self._thread is None or self._thread.ended.wait(seconds)
