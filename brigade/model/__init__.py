"""What is computed? Forward passes, weights, the cache and sampling: torch, but no processes, no torch.distributed."""
