"""Stages that are not in memory while they do not work: ``store`` keeps their bytes, ``residency``
says which are in memory, and moves the others beside the work.
"""
