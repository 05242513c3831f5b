"""From a graph to stages: what crosses, where a cut is legal, stages and training functions."""
