"""Tests of dni_fx; `models`, `random_models` and `oracles` hold what they share."""
