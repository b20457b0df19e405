"""The host server as a program: `python host_program.py PLAN.json FOLDER ROOT` says its port and serves."""

from __future__ import annotations

import sys
from pathlib import Path

from caltrain.crypto.dsse import SigningKey
from caltrain.host.server import bind, serve
from caltrain.plan import plan_from_json


def main(plan: str, folder: str, root: str) -> None:
    """Serve until a signal comes."""
    agreed, key = plan_from_json(Path(plan).read_bytes()), SigningKey(Path(root).read_bytes())
    sock = bind("127.0.0.1", 0)
    sys.stdout.write(f"{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    serve(agreed, folder=Path(folder), sock=sock, root=key, auto_start=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
