"""Stages on several processes."""
