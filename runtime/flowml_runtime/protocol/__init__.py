"""The sans-IO state machines: `step(event) -> list[action]`. They use no threads, clocks, sockets or arrays."""
