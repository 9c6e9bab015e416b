"""Import other tools' pruning files; export compact checkpoints."""
