"""Every source on every executor: generated from the lists that the code itself goes by."""
