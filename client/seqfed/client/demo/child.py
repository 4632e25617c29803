"""A `seqfed` command as another process's child: it ends when that process does, however that came about.

`python -m seqfed.client.demo.child PARENT COMMAND...`, where PARENT is the process id of whoever starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from seqfed.common.cli import main


def end_with(parent: int) -> None:
    """Ask Linux for SIGTERM when the parent dies; elsewhere children outlive a parent that was killed."""
    pr_set_pdeathsig = 1  # prctl.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:  # it was over before we had asked
            raise SystemExit(1)


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    main()
