"""Tree attention and choices as kernels, and the numpy references that define what they compute."""
