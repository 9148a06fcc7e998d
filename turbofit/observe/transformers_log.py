"""What the fallback engine and the Python around it print, one line at a time, as typed events."""

from __future__ import annotations

from typing import Final

from turbofit.observe.turbomind_log import Event, Starting, parse_line

__all__ = ["fallback_line"]

#: The server's own words (`launch.fallback.server`); what uvicorn, Python and torch say is the same
#: as under LMDeploy.
_LOADING: Final = "turbofit-fallback: loading weights"


def fallback_line(line: str) -> Event | None:
    """The event that one line of a log tells of, or None."""
    return Starting() if line.startswith(_LOADING) else parse_line(line)
