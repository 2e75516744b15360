"""The traced program: graphs, their labels, what a node costs, and what must hold of them."""
