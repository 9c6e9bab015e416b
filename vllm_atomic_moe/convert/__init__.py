"""Other tools' files in, compact checkpoints out."""
