"""Passes: pure functions on graphs. Imported as ``dni_fx.passes``."""

if __name__ == "passes":
    raise ImportError("import dni_fx.passes; this folder is not a package of its own")
