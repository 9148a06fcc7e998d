"""``python -m bench.gateway``: which programs this bench has."""

from __future__ import annotations

import sys

from bench.common.programs import show_programs

PROGRAMS = (
    "run",
    "balance",
    "rules",
    "routing",
    "hostile",
    "fuzz",
    "edges",
    "grammars",
    "poison",
    "stalls",
)

if __name__ == "__main__":
    sys.exit(show_programs("gateway", PROGRAMS))
