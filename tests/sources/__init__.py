"""Sources of gradients and inputs: their mathematics alone, and each kind inside the trainer."""
