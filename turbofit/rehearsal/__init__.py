"""Runs real engines on pretend GPUs, in child processes, and reads how much memory they allocate.

``planned`` makes a specification from a plan, and puts the results into the plan's ledger. ``run``
starts the child, and ``child`` drives the engine. ``engines`` says how each engine is rehearsed.
``pretend`` has the stand-ins for CUDA's libraries.
"""
