"""`ht-export inspect`: what an engine is, where its weights are, what a pass costs, and where its time goes."""
