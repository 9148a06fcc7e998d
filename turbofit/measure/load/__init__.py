"""Sends a load of requests to an OpenAI-compatible server, and measures the answers."""
