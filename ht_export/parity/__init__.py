"""`ht-parity`: an engine compared with its base model stage by stage, layer by layer, and in the text."""
