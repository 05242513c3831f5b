"""The examples and experiments, run as users run them."""
