"""A load of requests on an OpenAI-compatible server, and its measurements."""
