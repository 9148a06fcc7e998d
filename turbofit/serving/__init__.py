"""Runs of a server: processes, their supervision, the pipeline, the cluster.

Read in this order: ``run`` (measure, plan, reserve), ``start`` (one start, and the next one with a
lower plan), ``supervisor`` (all engines), ``engine.supervised_engine`` (one engine),
``engine.launches`` (its command), ``engine.process`` (its process).
"""
