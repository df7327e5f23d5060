"""`mmclip serve`: a page and an API on this machine."""

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mmclip.cli.plain import IN_OUT, PlainCommand
from mmclip.cli.shared import CpuOption, RuleOption
from mmclip.progress import console

app = typer.Typer()

NETWORK = "Network and limits"
"""Title of a panel of the help."""

MIN_TOKEN_CHARS = 16
"""[chosen: 16 letters of a random token are 96 bits]"""

DEMO_RUN = Path("runs/demo/run")
"""Where `mmclip demo` leaves its run."""


ModelOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Run, checkpoint or fine-tuned result. [runs/demo/run]",
        metavar="PATH",
    ),
]
IndexOption = Annotated[
    list[Path] | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Data folder to search for similar images; may be repeated.",
        metavar="PATH",
    ),
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=IN_OUT,
        help="Results of the model, for its validation scores. [those in or around the run]",
        metavar="PATH",
    ),
]
HostOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=NETWORK,
        help="Address to listen on; any but 127.0.0.1 needs --token.",
        metavar="ADDRESS",
    ),
]
PortOption = Annotated[
    int,
    typer.Option(
        rich_help_panel=NETWORK, help="Port; 0 takes a free one.", min=0, max=65535, metavar="N"
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=NETWORK,
        help="Secret that clients must send; better set MMCLIP_TOKEN, which no process list shows.",
        envvar="MMCLIP_TOKEN",
        show_envvar=False,
        metavar="TEXT",
    ),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=NETWORK,
        help="Further name of this machine, as browsers call it; may be repeated.",
        metavar="NAME",
    ),
]
MaxMbOption = Annotated[
    int,
    typer.Option(rich_help_panel=NETWORK, help="Largest request, in MB.", min=1, metavar="N"),
]
PerMinuteOption = Annotated[
    int,
    typer.Option(
        rich_help_panel=NETWORK, help="Requests per minute from one address.", min=1, metavar="N"
    ),
]
TimeoutSOption = Annotated[
    float,
    typer.Option(
        rich_help_panel=NETWORK, help="Seconds that an answer may take.", min=1, metavar="N"
    ),
]


@app.command(cls=PlainCommand)
def serve(
    model: ModelOption = None,
    index: IndexOption = None,
    reference: ReferenceOption = None,
    rule: RuleOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 7860,
    token: TokenOption = None,
    allow_host: AllowHostOption = None,
    max_mb: MaxMbOption = 64,
    per_minute: PerMinuteOption = 600,
    timeout_s: TimeoutSOption = 60.0,
    cpu: CpuOption = False,
) -> None:
    """Serves a page and an API on this machine: scores, saliency maps and search for your images.

    Nothing that is uploaded is stored or logged, and no request leaves the machine.

    Example: `mmclip serve --model runs/a --index data/images`
    """
    if missing := [name for name in ("fastapi", "uvicorn", "multipart") if find_spec(name) is None]:
        raise ValueError(
            f"`mmclip serve` needs {', '.join(missing)}; install what it needs by "
            f"pip install 'mmclip[serve]'"
        )
    chosen = model or _demo_run()
    _check_token(host, token)
    bound = _bind(host, port)

    from mmclip.serving.app import create_app
    from mmclip.serving.limits import Access, Limits
    from mmclip.serving.server import run_server
    from mmclip.serving.service import ServeRequest, open_service

    device = "cpu" if cpu else "auto"
    service = open_service(ServeRequest(chosen, tuple(index or ()), reference, device, rule))
    named = [*(allow_host or ()), *([socket.gethostname()] if token else [])]
    access = Access(token, frozenset(name.lower() for name in named))
    limits = Limits(request_bytes=max_mb << 20, per_minute=per_minute, timeout_s=timeout_s)
    run_server(create_app(service, access, limits), bound, lambda: _say_where(bound, token))


def _demo_run() -> str:
    """The demo's run, where no model is named.

    Raises:
        ValueError: When there is none.
    """
    if not DEMO_RUN.is_dir():
        raise ValueError(
            f"no model is named and there is no {DEMO_RUN}; name one by --model, or make one: "
            f"`mmclip demo`, then `mmclip serve`"
        )
    return str(DEMO_RUN)


def _check_token(host: str, token: str | None) -> None:
    """Refuses to listen to others without a token, and a token that can be guessed.

    Raises:
        ValueError: When it does.
    """
    if token is not None and len(token) < MIN_TOKEN_CHARS:
        raise ValueError(
            f"the token has {len(token)} characters, at least {MIN_TOKEN_CHARS} are needed; take "
            f"one of `python -c 'import secrets; print(secrets.token_urlsafe())'`"
        )
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"--host {host} lets other machines in; add --token, or set MMCLIP_TOKEN, so that only "
            f"those who know it are answered"
        )


def _bind(host: str, port: int) -> socket.socket:
    """The socket, before a model is loaded: a port that is taken is told at once.

    Raises:
        ValueError: When it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror or error}); choose another by "
            f"--port or --host"
        ) from None


def _say_where(bound: socket.socket, token: str | None) -> None:
    """The address of the page, alone on stdout."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    console.print("serving until Ctrl-C; not a medical device", markup=False)
    if token is not None:
        console.print("the page asks for the token", markup=False)
    print(f"http://{shown}:{port}/", flush=True)
