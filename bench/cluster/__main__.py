"""``python -m bench.cluster``: which programs this bench has."""

from __future__ import annotations

import sys

from bench.programs import show_programs

PROGRAMS = ("faults", "apart", "keeping", "private_ray", "planning")

if __name__ == "__main__":
    sys.exit(show_programs("cluster", PROGRAMS))
