"""The algebra: `phantom`, `tensor_parallel`, and `split`, the protocol that both follow."""
