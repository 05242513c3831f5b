"""The graphs of one decoupled model, its stages, and the nested values that go in and come out."""
