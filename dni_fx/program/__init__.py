"""The program as files: what was emitted for a model, written as Python that imports torch alone.

``text`` writes values and wraps lines; ``functions`` and ``constructors`` name what a graph calls;
``scopes`` finds the modules in a stage's graph again, ``bodies`` writes their ``forward``,
``classes`` the rest of them; ``sources`` do the same for what stands in for later stages;
``stages``, ``training``, ``windows`` write the files, ``folder`` puts them in their place. Graphs
are read here, never changed.
"""
