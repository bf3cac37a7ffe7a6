"""The Hugging Face side: the model's code that travels with an export, what stands around it, and the check of it."""
