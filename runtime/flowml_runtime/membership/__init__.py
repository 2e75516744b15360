"""Runs membership on real clocks and sockets: the coordinator, and the members that it watches."""
