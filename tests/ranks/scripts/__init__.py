"""What the tests of distributed training start as processes."""
