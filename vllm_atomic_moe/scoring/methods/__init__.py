"""The pruning methods. Each file has the name of its method, and its `METHOD`."""
