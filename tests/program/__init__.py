"""The program as files."""
