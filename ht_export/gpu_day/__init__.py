"""`scripts/gpu_day.py`: everything that needs a GPU, on a machine that is there for a short time and has no network."""
