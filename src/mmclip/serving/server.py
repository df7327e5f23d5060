"""Runs the application until Ctrl-C, without a line of log on any request."""

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI


class _Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()


def run_server(app: FastAPI, bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        app: The application.
        bound: A socket that listens.
        on_start: Is called when requests are answered.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # a client could name itself another address for each request
        timeout_graceful_shutdown=2,
        ws="none",
    )
    with unlogged():
        _Server(config, on_start).run([bound])


@contextmanager
def unlogged() -> Iterator[None]:
    """Keeps what this package says of requests out of every log: it quotes findings and phrases.

    Answers carry its warnings (`service.Answer`).
    """
    logger, nowhere = logging.getLogger("mmclip"), logging.NullHandler()
    was = logger.propagate
    logger.addHandler(nowhere)  # without any, logging has one of its own
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = was
        logger.removeHandler(nowhere)
