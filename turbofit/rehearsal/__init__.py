"""Runs real engines on pretend machines, in children, and reads what they allocated.

``planned`` makes a specification of a plan, ``run`` starts the child, ``engines`` has the adapter of each engine, ``child``
drives the engine, and ``planned`` puts what it allocated into the ledger. ``pretend`` has the
stand-ins for CUDA's libraries.
"""
