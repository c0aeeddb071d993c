"""Self-speculative decoding (Draft & Verify, arXiv 2309.08168), a yardstick: the model drafts without some blocks."""
