"""Stages on threads."""
