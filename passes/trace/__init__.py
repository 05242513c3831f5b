"""From a model to a graph: recorded calls, then ``torch.export``."""
