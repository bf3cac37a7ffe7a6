"""The official implementation's weights: one `pytorch_model.bin` of fp32, bf16 or fp16 tensors, under its names.

The format has no optimizer state and no temperatures: the official code computes tau from the number of tokens.
"""
