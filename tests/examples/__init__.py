"""The examples, each run as a user runs it."""
