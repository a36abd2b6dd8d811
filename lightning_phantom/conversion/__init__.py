"""Dense checkpoints to phantom ones and back, offline."""
