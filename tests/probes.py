"""Strangers who connect, say nothing and are gone."""

import socket


def probe(endpoint: str, count: int) -> None:
    """Connect `count` times to an endpoint of this machine, as a port scan or a health check does."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    for _ in range(count):
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.recv(1)  # let in: faster than that, the kernel would make it wait for a second
