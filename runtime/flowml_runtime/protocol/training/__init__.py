"""The sans-IO machines of training: what replicas, homes, the leader and the ledger decide."""
