"""Turns a placed graph into device programs: partitions, transfers, schedule, executables and instruction lists."""
