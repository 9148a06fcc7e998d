"""Runs a server: starts and supervises engine processes, on one machine or a cluster.

Also opens the pipeline. Read in this order: ``run`` (measure, plan, reserve), ``start`` (one start,
and the next start with a lower plan), ``supervisor`` (all engines), ``engine.supervised_engine``
(one engine), ``engine.launches`` (its command), ``engine.process`` (its process).
"""
