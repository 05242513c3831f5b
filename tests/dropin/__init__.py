"""The drop-in: a decoupled model in an ordinary loop."""
