"""Nothing reaches the network at import, and nothing in the tests."""

import socket
import subprocess
import sys

import pytest

from tests.network import NetworkUsed
from tests.test_imports import MODULES

NO_SOCKETS = """
import socket, sys
def refuse(*_, **__):
    raise SystemExit("an import used the network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = refuse
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_no_module_uses_the_network_at_import():
    names = [name for name in MODULES if not name.endswith("__main__")]
    ended = subprocess.run(
        [sys.executable, "-c", NO_SOCKETS, *names], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0), ("a.test", 80)])
def test_a_test_reaches_no_other_machine(address: tuple):
    kind = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(kind) as one, pytest.raises(NetworkUsed):
        one.connect(address)


def test_a_test_may_reach_its_own_machine():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
