"""Training steps: stores with their optimizers, replicas, and the compiler that adds them to a graph."""
