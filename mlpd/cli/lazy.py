"""Groups whose commands are imported when used, and the one place where errors become exit codes.

An MlpdError leaves as `error: message [code]` and `hint: ...` on stderr with exit code 1, or 2 when
the configuration is wrong (as click does for wrong usage); Ctrl-C as 130.  A closed pipe ends
quietly.
"""

import contextlib
import errno
import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import click

from mlpd.core.errors import ConfigurationError, InternalError, MlpdError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
AS_JSON = "mlpd.json"
"""Key in a context's `meta`: the command was called with --json."""

TRACEBACK_VARIABLE = "MLPD_TRACEBACK"
"""Environment variable that lets errors that are bugs show their traceback."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command that isn't imported yet: `target` is `module:attribute`, `help` its one line."""

    target: str
    help: str

    def load(self) -> click.Command:
        """Import and return the command."""
        module, _, attribute = self.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


class OrderedGroup(click.Group):
    """A group whose commands are listed as they are written, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in the order of definition."""
        return list(self.commands)


class LazyGroup(OrderedGroup):
    """A group of `Lazy` commands under headings; its --help imports none of them."""

    def __init__(
        self, *args: Any, sections: Mapping[str, Mapping[str, Lazy]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections or {}
        self.lazy = {name: c for part in self.sections.values() for name, c in part.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the sections."""
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported now."""
        lazy = self.lazy.get(cmd_name)
        return super().get_command(ctx, cmd_name) if lazy is None else lazy.load()

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        """Write one table of commands per section, all equally wide."""
        width = max(map(len, self.lazy), default=0)
        for title, commands in self.sections.items():
            rows = [(name.ljust(width), lazy.help) for name, lazy in commands.items()]
            with formatter.section(title):
                formatter.write_dl(rows)


class RootGroup(LazyGroup):
    """The command `mlpd`: every error of a command passes here."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors raised on purpose, and bugs, become a `Failure`."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe is noticed here, where click handles it
        except MlpdError as error:
            raise Failure(error, as_json=bool(ctx.meta.get(AS_JSON))) from error
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise Failure(_from_os(error), as_json=bool(ctx.meta.get(AS_JSON))) from error
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            raise Failure(_bug(error), as_json=bool(ctx.meta.get(AS_JSON))) from error
        return result


class Failure(click.ClickException):
    """An error as the command line shows it; with --json also as `{"error": ...}` on stdout."""

    def __init__(self, error: MlpdError, *, as_json: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.as_json = as_json
        usage = isinstance(error, ConfigurationError)
        self.exit_code = EXIT_USAGE if usage else 1  # type: ignore[misc]  # click reads it so

    def show(self, file: IO[Any] | None = None) -> None:
        """Write message, code and hint to stderr."""
        if self.as_json:
            with contextlib.suppress(OSError):  # stdout itself may be what failed
                click.echo(json.dumps({"error": self.error.to_dict()}))
        label = click.style("error:", fg="red", bold=True)
        code = click.style(f"[{self.error.code}]", dim=True)
        click.echo(f"{label} {printable(self.error.message)} {code}", file=file, err=True)
        if self.error.hint:
            label = click.style("hint:", fg="cyan")
            click.echo(f"{label} {printable(self.error.hint)}", file=file, err=True)


def printable(text: str) -> str:
    """Return `text` with control characters escaped: data never steers the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _from_os(error: OSError) -> MlpdError:
    where = "" if error.filename is None else f"{error.filename}: "
    return MlpdError(f"{where}{error.strerror or error}", code="operating_system")


def _bug(error: Exception) -> MlpdError:
    return InternalError(
        f"{type(error).__name__}: {error}",
        hint=f"This is a bug in mlpd; please report it.  {TRACEBACK_VARIABLE}=1 shows where.",
    )
