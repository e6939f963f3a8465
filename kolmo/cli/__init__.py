"""The command line: results go to stdout, progress and messages to stderr.

Exit codes: 0 done, 1 failed or interrupted, 2 bad input. A mistake of the user never shows a traceback.
"""

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kolmo.cli.commands import kolmo
from kolmo.errors import InputError, KolmoError, KolmoWarning

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
    with contextlib.ExitStack() as stack:
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            stream = getattr(sys, name)
            if stream is None:  # closed by who started this: nobody listens
                stack.enter_context(redirect(stack.enter_context(Path(os.devnull).open("w"))))
            elif isinstance(stream, io.TextIOWrapper):  # a terminal that knows no ± shows something in its place
                stream.reconfigure(errors="replace")
        return _answered(arguments)


def _answered(arguments: Sequence[str] | None) -> int:
    """Answer, and say in one line what went wrong."""
    # a polite kill, or a terminal that is closed, ends a run like Ctrl-C does; nohup stays nohup
    before = {n: signal.signal(n, signal.default_int_handler) for n in _ENDING if signal.getsignal(n) != signal.SIG_IGN}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", KolmoWarning)
            warnings.showwarning = _say(warnings.showwarning)
            code = kolmo.main(args=arguments, prog_name="kolmo", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.Abort:
        return _ended("interrupted.")
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KolmoError as error:
        return _ended(f"{error}", 2 if isinstance(error, InputError) else 1)
    except MemoryError as error:
        return _ended(f"out of memory{f': {error}' if str(error) else ''}.")
    except BrokenPipeError:
        return _ended("")  # who read the results has left
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _ended(f"the system refuses: {error.strerror or error}{where}.")
    except Exception as error:
        return _ended(f"{type(error).__name__}: {error}. This is a mistake in kolmo.{_kept_trace()}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _ended(message: str, code: int = 1) -> int:
    """Say why, as far as anybody listens, and return the exit code."""
    with contextlib.suppress(OSError, ValueError):
        if message:
            click.echo(f"kolmo: {message}", err=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return code
    # what cannot be written would be tried again, and complained of, when Python ends
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _say(others: Callable[..., Any]) -> Callable[..., Any]:
    """Show kolmo's warnings in one line each, and others as before."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, KolmoWarning):
            click.echo(f"kolmo: {message}", err=True)
        else:
            others(message, category, *rest, **named)

    return show


def _kept_trace() -> str:
    """Write the trace of the present exception to a file, and say where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kolmo-trace-", suffix=".txt", delete=False) as file:
            file.write(traceback.format_exc())
        return f" Please report it, with {file.name} and what `kolmo info` shows."
    except OSError:
        return " Please report it, with what `kolmo info` shows."
