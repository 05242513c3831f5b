"""Recurrent models trained window by window, and collections of networks with their own clocks."""
