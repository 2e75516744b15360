"""The console script `flowml`. It imports nothing that is slow before signals wait for the command to heed them."""

from __future__ import annotations

import signal


def main() -> int:
    """Run the command. Signals that come while modules are imported are handled when it begins (`main._heed_signals`):
    raised in an import they would print a traceback, or end a library that is being loaded."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    from flowml_tools import main as command

    return command.main()
