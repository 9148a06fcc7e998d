"""Runs real engines on pretend machines, in children, and reads what they allocated.

``planned`` makes a specification of a plan and puts the results into the plan's ledger, ``run``
starts the child, ``child`` drives the engine, and ``engines`` has an adapter for each engine.
``pretend`` has the stand-ins for CUDA's libraries.
"""
