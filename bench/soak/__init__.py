"""Hours of requests and faults: what grows, and what becomes slower."""
