"""`seqfed` as a server that kills itself: `python -m tests.integration.killing_server PARENT POINT COUNT server FLAGS...`.

At the COUNTth time that it comes to this point of `seqfed.server.points` it is over, as by kill -9 from outside.
"""

from __future__ import annotations

import os
import signal
import sys

from seqfed.client.demo.child import end_with
from seqfed.common.cli import main
from seqfed.server import points


def kill_at(point: str, count: int) -> None:
    left = count

    def hook(name: str) -> None:
        nonlocal left
        left -= name == point
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    points.hook = hook


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    kill_at(sys.argv.pop(1), int(sys.argv.pop(1)))
    main()
