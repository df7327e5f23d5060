"""No test reaches another machine: sockets connect to this one alone."""

import ipaddress
import socket
from typing import Any

_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


class NetworkUsed(RuntimeError):
    """Something tried to reach another machine."""


def _check(address: Any) -> None:
    if not isinstance(address, tuple):
        return  # a path: a socket of this machine
    host = str(address[0])
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host in ("localhost", "")
    if not is_here:
        raise NetworkUsed(f"a test connects to {address}")


def block_network() -> None:
    """Refuses connections to other machines, in this process and in those that it forks."""

    def connect(self: socket.socket, address: Any) -> None:
        _check(address)
        _connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        _check(address)
        return _connect_ex(self, address)

    socket.socket.connect = connect  # pyright: ignore[reportAttributeAccessIssue]
    socket.socket.connect_ex = connect_ex  # pyright: ignore[reportAttributeAccessIssue]
