"""`geomirror` and `python -m geomirror`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    if not __debug__:
        # Invariants are asserted in production too; without asserts they are hopes.
        sys.exit("geomirror: does not run with python -O or PYTHONOPTIMIZE")
    from geomirror.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
