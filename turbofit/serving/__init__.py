"""Runs a server: starts and supervises engine processes, on one machine or a cluster.

The package also opens the pipeline. Read its modules in this order: ``run`` (measure, plan,
reserve), ``start`` (one start, and the next start with a lower plan), ``supervisor`` (all engines),
``engine.supervised_engine`` (one engine), ``engine.launches`` (an engine's command),
``engine.process`` (an engine's process).
"""
