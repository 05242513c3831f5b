"""The project around the library: its pages, its packaging, its command line."""
