"""Runs of a server: processes, their supervision, the pipeline, the cluster."""
