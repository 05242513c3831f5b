"""Reports: comparisons, verdicts, histories, pictures."""
