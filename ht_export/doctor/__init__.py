"""`ht-doctor`: what this machine can run. Imports the standard library and `runtime` only: the rest may be missing."""
