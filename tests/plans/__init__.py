"""Plans: how cuts are searched, what they are predicted to cost, and how they are drawn."""
