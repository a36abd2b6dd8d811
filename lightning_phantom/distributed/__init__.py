"""The ranks: groups, collectives, gradients, replicas. Knows no layer and no Lightning."""
