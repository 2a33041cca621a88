"""A command's connection: --url and --json, the client made when first used, closed at the end."""

import functools
import getpass
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import click

from mlpd.cli.lazy import AS_JSON
from mlpd.cli.output import print_json

if TYPE_CHECKING:
    from mlpd.client import Client

DEFAULT_URL = "http://127.0.0.1:8700"
URL_VARIABLE = "MLPD_URL"

TIMEOUT_S = 60.0
PATIENT_TIMEOUT_S = 4 * 3600.0

Options = ParamSpec("Options")


class Session:
    """What a command talks through: `client` to the daemon, `show` to whoever called it."""

    def __init__(self, url: str, *, as_json: bool) -> None:
        self.url = _absolute(url)
        self.as_json = as_json
        self._clients: dict[float, Client] = {}

    @property
    def client(self) -> "Client":
        """The client; its errors name the URL."""
        return self._connect(TIMEOUT_S)

    @property
    def patient_client(self) -> "Client":
        """The client for calls that do much work before they answer."""
        return self._connect(PATIENT_TIMEOUT_S)

    def show(self, answer: Any, render: Callable[[Any], None]) -> None:
        """Write `answer` as JSON with --json, else let `render` write it for people."""
        if self.as_json:
            print_json(answer)
        else:
            render(answer)

    def close(self) -> None:
        """Close the connections that there are."""
        for client in self._clients.values():
            client.close()

    def _connect(self, timeout_s: float) -> "Client":
        from mlpd.client import Client

        if timeout_s not in self._clients:
            self._clients[timeout_s] = Client(self.url, timeout_s=timeout_s, by=_who())
        return self._clients[timeout_s]


def connected(
    command: Callable[Concatenate[Session, Options], None],
) -> Callable[Options, None]:
    """Give a command --url and --json; it takes the session first."""

    @click.option(
        "--url",
        envvar=URL_VARIABLE,
        default=DEFAULT_URL,
        show_default=True,
        show_envvar=True,
        help="The daemon; unix:PATH for its socket.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    @functools.wraps(command)
    def run(*args: Options.args, **kwargs: Options.kwargs) -> None:
        url, as_json = str(kwargs.pop("url")), bool(kwargs.pop("as_json"))
        click.get_current_context().meta[AS_JSON] = as_json
        session = Session(url, as_json=as_json)
        try:
            command(session, *args, **kwargs)
        finally:
            session.close()

    return run


def _absolute(url: str) -> str:
    """Return the URL of a unix socket with its path from the root."""
    path = url.removeprefix("unix:")
    return url if path == url else f"unix:{os.path.abspath(path)}"  # noqa: PTH100 - no symlinks


def _who() -> str:
    """Return who changes something, for the histories of models and routes."""
    try:
        return f"{getpass.getuser()} (command line)"
    except (KeyError, OSError):  # a user id without a name, as containers have
        return f"user {os.getuid()} (command line)"


def examples(*lines: str) -> str:
    """Return an epilog that shows `lines` as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


yes_option = click.option("--yes", "-y", is_flag=True, help="Don't ask.")
"""For commands that take something away."""


def confirm(session: Session, question: str, *, yes: bool) -> None:
    """Ask before something is taken away; a no aborts, nobody to answer is a usage error."""
    if yes:
        return
    if session.as_json or not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody is here to answer: add --yes.")
    click.confirm(question, abort=True, err=True)
