"""Export to and import from transformers: tensors, configuration, tokenizer, model code, and a check of the result."""
