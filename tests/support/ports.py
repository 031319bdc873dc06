"""Ports of this host that nobody listens on."""

from __future__ import annotations

import socket


def free_ports(count: int) -> int:
    """The first of `count` free ports that follow each other."""
    for first in range(20000, 60000, 97):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")
