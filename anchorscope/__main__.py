"""`python -m anchorscope`, and the entry point of the `anchorscope` program."""

import sys

from anchorscope.cli import main


def run() -> None:
    """Run the program and leave with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
