"""Seed of torch's global generator in every test."""

SEED = 20261
