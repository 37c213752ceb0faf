"""Files and what is in them: bases, masks, checkpoints, runs, their digests and locks. Nothing here runs a model."""
