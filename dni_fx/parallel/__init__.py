"""Stages that run at once: on threads, and on the ranks of ``torch.distributed``."""
