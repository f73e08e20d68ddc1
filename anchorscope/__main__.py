"""`python -m anchorscope`, and the entry point of the `anchorscope` program."""

import signal
import sys


def run() -> None:
    """Run the program and leave with its exit code."""
    try:
        from anchorscope.cli import main

        code = main()
    except KeyboardInterrupt:  # while the program itself is still being imported, or after its last line
        print("error: interrupted; nothing unfinished looks complete", file=sys.stderr)
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
    sys.exit(code)


if __name__ == "__main__":
    run()
