"""Measures and stores links between peers, and collects them in one table."""
