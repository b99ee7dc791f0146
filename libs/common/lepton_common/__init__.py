"""What every Lepton service shares."""

import os

# gRPC reads this when it is imported, so it is set before any module here can do so. Its fork handlers are for children
# that go on using gRPC. Ours start other programs, and on uvloop the handlers crashed one in twenty of them (SIGSEGV).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
