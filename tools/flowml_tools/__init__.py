"""The `flowml` command."""
