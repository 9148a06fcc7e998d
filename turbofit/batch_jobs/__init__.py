"""Sends files and folders of requests to a server, until each request has an output line."""
