"""From a placed graph to what devices run: partitions, transfers, the schedule, executables, instruction lists."""
