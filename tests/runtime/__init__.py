"""One process: the trainer, the drop-in module, its reports and its refusals."""
