"""`turbofit bench` beside guidellm, on one paced server."""
