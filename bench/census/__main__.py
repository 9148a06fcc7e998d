"""``python -m bench.census``: which programs this bench has."""

from __future__ import annotations

import sys

from bench.programs import show_programs

PROGRAMS = ("wheels", "triton")

if __name__ == "__main__":
    sys.exit(show_programs("census", PROGRAMS))
