"""The search for cuts: costs, frontiers, the best chain of them, and a bound on it."""
