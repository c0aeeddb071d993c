"""The check of what needs an NVIDIA GPU: `ht-bench gpu`, or `python -m ht_export.bench.gpu` in a clone."""
