"""Recurrent models in windows, and collections of them."""
