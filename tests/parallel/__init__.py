"""Stages beside each other: on threads and on ranks."""
