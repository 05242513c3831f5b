"""The models that tests cut: a zoo of written ones, and random ones."""
