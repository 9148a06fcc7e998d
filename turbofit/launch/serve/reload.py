"""What a running server takes over of a profile that was changed, and what needs a restart."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.json_types import Options
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.run import Run

__all__ = ["LIVE", "Reloader"]

#: What the gateway takes over while it serves.
LIVE: Final = ("api_key", "allow_origins", "allowed_media_domains")


class Reloader:
    """Reads a server's options again, and hands the gateway what it can take over.

    ``options`` are what the run was started with, by name; ``read`` gives those of now and the
    public side that they make, and raises UsageError where something in them is wrong.
    """

    def __init__(
        self, run: Run, options: Options, read: Callable[[], tuple[Options, GatewayConfig]]
    ) -> None:
        self._run, self._options, self._read = run, dict(options), read
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Reload in a thread of its own: a signal handler may take no lock."""
        threading.Thread(target=self.reload, name="reload", daemon=True).start()

    def reload(self) -> None:
        """Reload, and say what was taken over and what was not; nothing changes by an error."""
        with self._lock:
            try:
                options, config = self._read()
                changed = _changed(self._options, options)
                taken = [name for name in changed if name in LIVE]
                if taken and not self._take_over(config):
                    taken = []
            except TurbofitError as exc:
                self._run.say(f"not reloaded: {exc.message} ({exc.hint})")
                return
            self._options |= {name: options.get(name) for name in taken}
            held = [name for name in changed if name not in taken]
            if held:
                self._run.say(f"needs a restart: {', '.join(held)}")
            self._run.say(f"reloaded: {', '.join(taken) or 'nothing'}")

    def _take_over(self, config: GatewayConfig) -> bool:
        """Change the gateway that serves, and those that later starts of the run open."""
        run, before = self._run, self._run.config.gateway
        if before is None:
            return False
        after = before.taking_over(config)
        if run.public is not None:
            run.public.call(lambda gateway: gateway.take_over(after))
        run.config = run.config.changed(gateway=after)
        return True


def _changed(before: Options, after: Options) -> list[str]:
    """The names of the options that differ."""
    names = dict.fromkeys((*before, *after))
    return [name for name in names if before.get(name) != after.get(name)]
