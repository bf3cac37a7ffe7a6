"""Models as plain torch.nn modules in one process, for people with a training loop of their own."""
