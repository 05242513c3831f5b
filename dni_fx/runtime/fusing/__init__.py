"""Fused training steps: the kernel's own step, recorded as one graph of plain operators.

``recording`` runs the kernel once and writes down what it does; ``updates`` are the optimisers as
functions; ``program`` puts both together into one compiled call; ``holding`` notices when what was
recorded no longer holds; ``steps`` decides for each batch whether a program runs it.
"""
