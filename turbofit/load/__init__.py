"""A load of requests on an OpenAI-compatible server, and what it measures."""
