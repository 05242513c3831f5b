"""What tests share: paths, oracles, and how a model is trained in a line."""
