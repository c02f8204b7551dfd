"""The specification of every op in plain PyTorch, under the op's own name."""
