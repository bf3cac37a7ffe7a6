"""Command lines over files: scripts in the source tree, commands of `megatron-tf` where the package is installed."""
