"""Bundles behind a network: HTTP, Triton's Python backend, Ray."""
