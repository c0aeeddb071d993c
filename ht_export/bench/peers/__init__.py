"""`ht-bench peers`: an engine beside other software that runs the same model, each in a process of its own."""
