"""Runs training under a virtual clock: a second interpreter of the training machines, beside the hosts of workers."""
