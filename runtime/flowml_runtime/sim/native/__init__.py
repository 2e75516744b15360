"""The simulator as machine code: its sources, rewritten and compiled by mypyc into a cache of the user."""
