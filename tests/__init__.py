"""Tests of dni_fx, a folder for each part; `models` and `helpers` hold what they share."""
