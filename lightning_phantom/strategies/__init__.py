"""Lightning: `phantom`, `tensor_parallel`, and what they share."""
