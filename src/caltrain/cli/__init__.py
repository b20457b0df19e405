"""The `caltrain` command: parses, calls, prints; nothing else.

Exit codes: 0 success; 2 wrong usage; 10 to 18 the family of the error (see `caltrain.errors`); 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    # These end like Ctrl-C, so that `finally` blocks run and no process is left behind.
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the console script."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup, SIGHUP is ignored: leave it so
            signal.signal(number, _terminate)
    try:
        from caltrain.cli.app import run  # noqa: PLC0415  # here: Ctrl-C during the imports must end quietly, too

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        sys.stderr.write("interrupted\n")
    sys.exit(code)
