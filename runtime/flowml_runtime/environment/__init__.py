"""What a process finds around itself: forks, standard streams, cores and memory, its C library."""
