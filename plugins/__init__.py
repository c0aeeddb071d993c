"""Tree attention as a kernel: the numpy reference that defines what it computes."""
