"""Who starts workers: threads of this process, or processes of this machine."""
