"""The sans-IO state machines of training: the decisions of replicas, homes, the leader and the ledger."""
