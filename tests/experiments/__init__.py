"""The experiments, run as users run them."""
