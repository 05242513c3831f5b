from ..passes.trace.state import preserved_rng
