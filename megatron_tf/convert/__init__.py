"""Conversion from and to other formats: the official implementation's weights and Hugging Face directories."""
