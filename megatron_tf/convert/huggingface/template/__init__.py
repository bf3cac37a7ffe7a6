"""The code that travels with an export; it runs without this package, with transformers alone."""
