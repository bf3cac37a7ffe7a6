"""Model code copied into exports; it only needs transformers, not this package."""
