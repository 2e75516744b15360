"""Sends messages with arrays between peers: within a process, on one machine, and between machines."""

import os

# gRPC reads these when it is first imported. Its fork handlers serve programs that fork during calls. flowml does not
# fork during calls, and the handlers would print a warning for every process that a user's program starts. Connection
# problems are reported by the errors of this package, so gRPC prints nothing to the terminal.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
