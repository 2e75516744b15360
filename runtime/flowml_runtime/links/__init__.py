"""Links between peers: measured, remembered, and put together in one table."""
