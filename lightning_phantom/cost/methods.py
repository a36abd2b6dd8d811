"""What is compared: the methods' names in options, in JSON and in the rows of tables, in their order."""

# They train the dense model: data parallelism, tensor parallelism of this package and torch's own.
EXACT = ("ddp", "fsdp", "tensor_parallel", "tensor_parallel_layerwise", "tensor_parallel_torch")
# `smaller` is a dense model of as many weights as the phantom one, under DDP.
METHODS = (*EXACT, "phantom", "smaller")
