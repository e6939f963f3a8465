"""The command line: results go to stdout, progress and messages to stderr.

Exit codes: 0 done, 1 failed or interrupted, 2 bad input. A mistake of the user never shows a traceback.

This room may import everything; what it does is done elsewhere.
"""

import io
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence

import click

from kolmo.cli.commands import kolmo
from kolmo.errors import InputError, KolmoError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        The arguments; those of the process if left out.

    Returns
    -------
    int
        0 done, 1 failed or interrupted, 2 bad input.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no ± shows something in its place
            stream.reconfigure(errors="replace")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends a run like Ctrl-C does
    try:
        code = kolmo.main(args=arguments, prog_name="kolmo", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.Abort:
        click.echo("kolmo: interrupted.", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KolmoError as error:
        click.echo(f"kolmo: {error}", err=True)
        return 2 if isinstance(error, InputError) else 1
    except MemoryError as error:
        click.echo(f"kolmo: out of memory{f': {error}' if str(error) else ''}.", err=True)
        return 1
    except Exception as error:
        click.echo(f"kolmo: {type(error).__name__}: {error}. This is a mistake in kolmo.{_kept_trace()}", err=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _kept_trace() -> str:
    """Write the trace of the present exception to a file, and say where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kolmo-trace-", suffix=".txt", delete=False) as file:
            file.write(traceback.format_exc())
        return f" Please report it, with {file.name} and what `kolmo info` shows."
    except OSError:
        return " Please report it, with what `kolmo info` shows."
