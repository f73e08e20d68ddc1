"""`python -m anchorscope`, and the entry point of the `anchorscope` program."""

import contextlib
import os
import signal
import sys

STOPPED = (130, 143)  # by Ctrl-C, by SIGTERM


def run() -> None:
    """Run the program and leave with its exit code."""
    try:
        from anchorscope.cli import main

        code = main()
    except KeyboardInterrupt:  # while the program itself is still being imported, or after its last line
        print("error: interrupted; nothing was written", file=sys.stderr)
        code = 130
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # there is nothing left to interrupt
    if code in STOPPED:
        # Python would end with the signal instead of the code if the interruption passed through a library's own run of
        # some Python text, as in many an import, and would wait for the libraries' threads.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
