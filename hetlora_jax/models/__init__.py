"""The decoder, its kernels and the loaders of pretrained weights."""
