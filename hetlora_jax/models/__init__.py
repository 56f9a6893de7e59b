"""The decoder, its kernels, shapes and tokenizers."""
