"""Exchanges values among the replicas of a fit: sums, digests, and averages with neighbours."""
