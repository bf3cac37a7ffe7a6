"""The seed of torch's own generator in every test."""

SEED = 20261
