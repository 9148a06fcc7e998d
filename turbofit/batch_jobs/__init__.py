"""Batches: files and folders of requests, sent to a server until each has an output line."""
