"""``python -m bench.simulation``: which programs this bench has."""

from __future__ import annotations

import sys

from bench.programs import show_programs

PROGRAMS = ("run", "planted", "coverage")

if __name__ == "__main__":
    sys.exit(show_programs("simulation", PROGRAMS))
