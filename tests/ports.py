"""Ports for processes that are to find each other."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of this machine that nothing listens on; accelerate 1.3 takes 0 for a port and waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
