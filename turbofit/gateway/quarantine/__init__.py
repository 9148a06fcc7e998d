"""What is known of requests that ended engines, and of their clients; knows no engine."""
