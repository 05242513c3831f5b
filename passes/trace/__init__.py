"""From a model to a graph: recorded calls, then ``torch.export``.

=====================  =======================================================================
a run is written down  ``tracing`` (the ladder), ``recorder``, ``routing``, ``provenance``,
                       ``sizes``, ``symbols``, ``questions``, ``modules``, ``exporting``
what comes out         ``traces``; of parts of it ``prefixes``, ``interpreting``, ``ports``
nothing is left of it  ``state``, which keeps memory (``storages``), what objects hold
                       (``reach`` finds them, ``contents`` keeps them), what functions
                       remember (``caches``) and torch's settings (``settings``)
where it holds         ``held`` and ``outside``: what the model's code has read
what no graph does     ``effects``: what the model's code changes outside of the model
of all of these        ``calls``, ``containers``, ``values``, ``naming``, ``nodes``
=====================  =======================================================================

Three files look at what Python objects hold, for three ends. ``graphs/pictures`` takes a picture
that a later one is compared with; ``contents`` can put back what was there, in place; ``outside``
reads code, to know which of all objects that code can find.
"""
