"""Trains from the calling process: the fit, its data, its history, and its tables."""
