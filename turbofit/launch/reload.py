"""A server's options, read again at SIGHUP."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.json_types import Options
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.run import Run


#: What the gateway takes over while it serves.
LIVE: Final = ("api_key", "allow_origins", "allowed_hosts", "allowed_media_domains")


class Reloader:
    """Reads a server's options again, and hands the gateway what it can take over.

    ``options`` are those of the start, by name; ``read`` gives those of now and the public side
    that they make, and raises UsageError where something in them is wrong.
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
        run, before = self._run, self._options
        with self._lock:
            try:
                options, config = self._read()
                changed = _changed(before, options)
                taken = [
                    name for name in changed if name in LIVE and run.config.gateway is not None
                ]
                if taken:
                    self._take_over(config)
            except TurbofitError as exc:
                run.say(f"not reloaded: {exc.message} ({exc.hint})")
                return
            before |= {name: options.get(name) for name in taken}
            if left := [name for name in changed if name not in taken]:
                run.say(f"needs a restart: {', '.join(left)}")
            run.say(f"reloaded: {', '.join(taken) or 'nothing'}")

    def _take_over(self, config: GatewayConfig) -> None:
        """Have the gateway that serves now, and the next one, follow this public side."""
        run = self._run
        assert run.config.gateway is not None
        after = run.config.gateway.taking_over(config)
        if run.public is not None:
            run.public.call(lambda gateway: gateway.take_over(after))
        run.config = run.config.changed(gateway=after)


def _changed(before: Options, after: Options) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
