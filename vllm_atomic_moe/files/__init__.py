"""What is on disk: checkpoints, profiles, exported weights. Needs torch alone."""
