"""Tracing, cutting, emitting: the graph's half of decoupling, against eager PyTorch."""
