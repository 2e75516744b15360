"""Messages with arrays between peers: in this process, on this machine, between machines."""

import os

# Read by gRPC when it is first imported. Its fork handlers are for programs that fork with calls under way; here
# nothing does, and all they would add is a warning for every process that a user's program starts. What is wrong with
# a connection is said by the errors of this package, not by lines on the user's terminal.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
