"""Directories for transformers: tensors, configuration, tokenizer, the model's code, and the check of all of them."""
