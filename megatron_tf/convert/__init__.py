"""Other programs' formats: the official implementation's weights, and Hugging Face directories."""
