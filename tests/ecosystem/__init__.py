"""Tests that need more than the core: `make ecosystem`. A plain pytest does not collect them."""
