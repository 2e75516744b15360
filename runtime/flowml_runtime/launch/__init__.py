"""Starts workers, as threads of this process or as processes of this machine."""
