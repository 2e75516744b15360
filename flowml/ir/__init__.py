"""Traces functions to graphs, labels them, estimates the cost of nodes, and verifies graphs."""
