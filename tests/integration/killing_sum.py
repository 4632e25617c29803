"""`seqfed` as a server that kills itself in a masked sum.

`python -m tests.integration.killing_sum PARENT PURPOSE STEP COUNT server FLAGS...`: in the first sum of this purpose, with the
COUNTth message of this step (`sharing`, `masking`, `confirming`, `opening`), it is over, as by kill -9.
"""

from __future__ import annotations

import os
import signal
import sys

from seqfed.client.demo.child import end_with
from seqfed.common.cli import main
from seqfed.common.masking import server

Message = server.Shared | server.Masked | server.Confirming | server.Opened
STEPS: dict[str, type[Message]] = {
    "sharing": server.Shared,
    "masking": server.Masked,
    "confirming": server.Confirming,
    "opening": server.Opened,
}


def kill_at(purpose: str, step: str, count: int) -> None:
    on, taken = server.on, set[str]()

    def watched(state: server.State, event: server.Event) -> server.Next:
        found = on(state, event)
        if isinstance(event, Message) and type(event) is STEPS[step] and state.terms.purpose == purpose:
            taken.add(event.client)
            if len(taken) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return found

    server.on = watched


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    kill_at(sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)))
    main()
