"""Files on disk: checkpoints, profiles, exported weights. Needs torch alone."""
