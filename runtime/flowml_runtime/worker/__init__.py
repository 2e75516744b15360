"""A worker: its process, what it loads, and how it runs."""
