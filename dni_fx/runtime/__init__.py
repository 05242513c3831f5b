"""What runs a batch: the kernel, the optimisers, and the trainer of one process."""
