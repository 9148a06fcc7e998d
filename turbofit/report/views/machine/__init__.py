"""Sections on a machine: its GPUs, who uses them, how they reach each other."""
