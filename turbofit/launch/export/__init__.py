"""Manifests of a plan: `turbofit serve` under systemd, Docker Compose and Kubernetes."""
