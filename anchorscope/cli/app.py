"""The `anchorscope` program: commands, and what every way of failing looks like to the user."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from anchorscope._version import __version__
from anchorscope.cli.analyze import analyze, figures
from anchorscope.cli.bench import bench
from anchorscope.cli.calibrate import calibrate
from anchorscope.cli.capture import capture
from anchorscope.cli.common import say
from anchorscope.cli.compare import compare
from anchorscope.cli.evaluate import evaluate
from anchorscope.cli.heads import heads
from anchorscope.cli.help import HelpfulCommand, HelpfulGroup
from anchorscope.cli.info import info
from anchorscope.cli.merge import merge
from anchorscope.cli.report import report
from anchorscope.errors import AnchorScopeError
from anchorscope.files import visible

UsageError: Any = typer.BadParameter.__mro__[1]  # its home has moved between versions
AGAIN = 0.05  # seconds until an interruption that Python dropped is raised again
INTERRUPTED = "interrupted; nothing was written"


class _Stopped(Exception):
    """Ctrl-C or a request to end, on its way past typer, which would drop the sentence."""


class _Program(HelpfulGroup):
    """The commands; an interruption keeps its sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop) or INTERRUPTED) from None


app = typer.Typer(
    cls=_Program,
    name="anchorscope",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "See what your attention heads keep: recall against sparsity of anchor attention, per head, on your model and"
        " your prompts."
    ),
)
for command in (capture, info, analyze, figures, compare, heads, calibrate, merge, report, evaluate, bench):
    app.command(cls=HelpfulCommand)(command)


def _print_version(value: bool) -> None:
    if value:
        print(f"anchorscope {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 (bad usage or input), 1 (the run failed), 130 (Ctrl-C), 143
    (SIGTERM).

    A mistake of the user's is one sentence on stderr. A defect of ours says so; ANCHORSCOPE_DEBUG=1 shows its
    traceback.
    """
    with _signals() as received:
        code = _run(argv, received)
        return 128 + received[0] if received and code else code


def _run(argv: Sequence[str] | None, received: Sequence[int]) -> int:
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        code = app(given, prog_name="anchorscope", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return _misused(error)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code == 130:
            _complain(INTERRUPTED)
        return code
    except AnchorScopeError as error:
        return _complain(str(error), error, error.exit_code)
    except _Stopped as stop:
        return _complain(str(stop), code=130)
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, code=130)
    except MemoryError as error:
        return _complain("out of memory; use fewer tokens, layers or heads at a time", error)
    except OSError as error:
        if error.errno == errno.EPIPE:
            # The reader of our output went away (`| head`): not an error worth words.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if error.errno == errno.ENOSPC:
            return _complain(f"the disk is full ({error.filename or 'while writing'}); free some space", error)
        return _complain(f"{error.filename or 'the system'}: {error.strerror or error}", error)
    except Exception as error:  # the outermost frame: a defect of ours is called one, with code 1
        if received:  # libraries turn an interruption within an import into errors of their own
            return _complain(INTERRUPTED, error, 130)
        return _complain(
            f"internal error ({type(error).__name__}: {error}); please report it with the output of"
            " ANCHORSCOPE_DEBUG=1 anchorscope ...",
            error,
        )


def _misused(error: Any) -> int:
    """Say what is wrong with a command line, in one sentence; without any command, show the help."""
    page = error.format_message()
    if "Usage: " in page:
        print(page, file=sys.stderr)
        return int(error.exit_code)
    command = error.ctx.command_path if error.ctx is not None else "anchorscope"
    return _complain(f"{page.rstrip('.')}; see {command} --help", code=int(error.exit_code))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Let SIGTERM end a command as Ctrl-C does, parts kept and temporary files removed; the signals that came.

    Python drops an exception that a signal raises within a finalizer, and goes on. Then it is raised again a moment
    later, by an alarm.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    alarm = getattr(signal, "SIGALRM", None)  # not on Windows
    hook = sys.unraisablehook

    def stop(number: int, _: FrameType | None) -> None:
        if number != alarm:
            received.append(number)
        raise KeyboardInterrupt

    def dropped(event: Any) -> None:
        if alarm is not None and received and issubclass(event.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            hook(event)

    numbers = [signal.SIGINT, signal.SIGTERM] + ([] if alarm is None else [alarm])
    before = {number: signal.signal(number, stop) for number in numbers}
    sys.unraisablehook = dropped
    try:
        yield received
    finally:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(sentence: str, error: BaseException | None = None, code: int = 1) -> int:
    say(f"error: {visible(sentence, 2000)}")
    if error is not None and os.environ.get("ANCHORSCOPE_DEBUG") == "1":
        traceback.print_exception(error)
    return code
