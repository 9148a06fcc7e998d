"""Runs real engines on pretend machines, in child processes, and reads the memory they allocated.

``planned`` makes a specification from a plan and puts the results into the plan's ledger, ``run``
starts the child, ``child`` drives the engine, and ``engines`` says how each engine is rehearsed.
``pretend`` has the stand-ins for CUDA's libraries.
"""
