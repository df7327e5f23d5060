"""Who may ask, and for how much: everything that is checked before a route sees a request.

The page runs in a browser that also opens other sites, and those can send requests to 127.0.0.1. So
the Host header must name this machine (DNS rebinding), requests that another site makes are refused
(cross-site forms), and no CORS header ever allows one. Any other address than 127.0.0.1 needs a
token. Bodies stay in memory: nothing that is uploaded touches a disk.
"""

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer: the page may load nothing from elsewhere, and no cache keeps an image."""


@dataclass(frozen=True)
class Limits:
    """How much is answered.

    Attributes:
        request_bytes: Of a request's body.
        images: Of a request.
        texts: Findings or texts of a request.
        text_chars: Of a finding, phrase or text.
        per_minute: Requests of the API from one address.
        timeout_s: Wall time of a request.
        at_once: Requests whose bodies are in memory; further ones wait.
    """

    request_bytes: int = 64 << 20  # [chosen: 20 million pixels of 16 bits take 40 MB]
    images: int = 16
    texts: int = 64
    text_chars: int = 1000
    per_minute: int = 600
    timeout_s: float = 60.0
    at_once: int = 16


@dataclass(frozen=True)
class Access:
    """From where and by whom the server may be asked.

    Attributes:
        token: Needed for the API; None on 127.0.0.1.
        hosts: Further names of this machine that a Host header may hold, in lower case.
    """

    token: str | None = None
    hosts: frozenset[str] = frozenset()

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine.

        With a token it may be any address, as a rebound name is no address; without one, only those
        of this machine itself.
        """
        name = name_in(host)
        if name in LOOPBACK or name in self.hosts:
            return True
        return self.token is not None and _is_address(name)

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header holds the token, compared in constant time."""
        if self.token is None:
            return True
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.token.encode())
        return right and scheme.lower() == "bearer"


def name_in(host: str) -> str:
    """The name in a Host header, without its port and in lower case."""
    try:
        return (urlsplit(f"//{host.strip()}").hostname or "").rstrip(".")
    except ValueError:  # such as a bracket that is not closed
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass
class RateLimit:
    """So many requests a minute from each address, of which a quarter may come at once."""

    per_minute: int
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)  # by address: left, when

    def wait_s(self, address: str) -> float:
        """0 where a request of this address may pass, and counts it; else how long to wait."""
        now, burst = time.monotonic(), max(1.0, self.per_minute / 4)
        left, then = self._left.get(address, (burst, now))
        left = min(burst, left + (now - then) * self.per_minute / 60)
        if left < 1:
            return (1 - left) * 60 / self.per_minute
        if address not in self._left and len(self._left) >= 1000:
            del self._left[next(iter(self._left))]
        self._left[address] = (left - 1, now)
        return 0.0


class _Refusal(Exception):
    """An answer in place of a route's."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.error, self.headers = status, error, dict(headers or {})


class Guard:
    """Stands before an ASGI application; refuses with a status and one line of JSON."""

    def __init__(self, app: App, access: Access, limits: Limits) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._rate = RateLimit(limits.per_minute)
        self._room = asyncio.Semaphore(limits.at_once)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: there is none here
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *_encoded(HEADERS)]}
            await send(message)

        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._admit(scope, receive, answer)
        except TimeoutError:
            refusal = _Refusal(
                503, f"the answer takes more than {self._limits.timeout_s:g} s; try again later"
            )
        except _Refusal as error:
            refusal = error
        else:
            return
        if not started:
            await _refuse(refusal, answer)

    async def _admit(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Passes a request on when it keeps every rule.

        Raises:
            _Refusal: When it does not.
        """
        headers = {
            name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]
        }
        self._check_origin(headers)
        if not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        if not self._access.admits(headers.get("authorization", "")):
            raise _Refusal(
                401, "the token is missing or wrong; send Authorization: Bearer TOKEN, with the "
                "token that `mmclip serve` was started with", {"www-authenticate": "Bearer"},
            )  # fmt: skip
        client = scope.get("client")
        if wait_s := self._rate.wait_s(client[0] if client else ""):
            raise _Refusal(
                429, f"more than {self._limits.per_minute} requests a minute; wait {wait_s:.1f} s",
                {"retry-after": str(int(wait_s) + 1)},
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise _Refusal(400, "the Content-Length header is no number; leave it to the client")
        self._check_size(int(length))
        async with self._room:
            await self._app(scope, await self._in_memory(receive), send)

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if not self._access.knows(host):
            raise _Refusal(
                403, f"the Host header {host[:100]!r} does not name this machine; open the address "
                f"that `mmclip serve` prints, or start it with --allow-host"
            )  # fmt: skip
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        is_other = site not in (None, "same-origin", "none")
        if origin is not None:
            is_other |= origin.partition("://")[2].lower() != host.strip().lower()
        if is_other and headers.get("sec-fetch-mode") != "navigate":
            raise _Refusal(403, "another site sent this request; only the page itself may")
        if is_other and origin is not None:  # a form of another site navigates, and has an origin
            raise _Refusal(403, "another site sent this form; only the page itself may")

    def _check_size(self, n_bytes: int) -> None:
        if n_bytes > self._limits.request_bytes:
            most = self._limits.request_bytes / (1 << 20)
            raise _Refusal(
                413, f"the request has {n_bytes / (1 << 20):,.1f} MB, at most {most:g} are taken; "
                f"send fewer images at once, or start `mmclip serve` with a higher --max-mb",
                {"connection": "close"},
            )  # fmt: skip

    async def _in_memory(self, receive: Receive) -> Receive:
        """The whole body, read before a route sees it, and let go of as the route reads it."""
        chunks: list[Message] = []
        n_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                chunks.append(message)
                break
            n_bytes += len(message.get("body", b""))
            self._check_size(n_bytes)
            chunks.append(message)
            more = message.get("more_body", False)
        chunks.reverse()

        async def replay() -> Message:
            return chunks.pop() if chunks else await receive()

        return replay


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin1"), value.encode("latin1")) for name, value in headers.items()]


async def _refuse(refusal: _Refusal, send: Send) -> None:
    body = json.dumps({"error": refusal.error}).encode()
    headers = {
        "content-type": "application/json", "content-length": str(len(body)), **refusal.headers,
    }  # fmt: skip
    start = {"type": "http.response.start", "status": refusal.status, "headers": _encoded(headers)}
    await send(start)
    await send({"type": "http.response.body", "body": body})
