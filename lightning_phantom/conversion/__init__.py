"""Dense checkpoints to phantom ones and back, offline.

checkpoints      reads, converts and writes
calibrate        factors for the inputs that a layer really sees
calibration_run  runs a module on batches of its data to see them
report           what was done to each layer
on_disk          tensors larger than memory
"""
