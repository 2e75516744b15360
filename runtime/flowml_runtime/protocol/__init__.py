"""The sans-IO machines: `step(event) -> list[action]`. No threads, clocks, sockets or arrays in here."""
