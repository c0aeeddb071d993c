"""What runs in the process of each peer, in whatever Python has it: only the standard library, and the peer."""
