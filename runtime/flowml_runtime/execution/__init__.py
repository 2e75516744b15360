"""Running compiled programs step by step on the devices of one process."""
