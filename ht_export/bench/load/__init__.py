"""An engine under load: many requests at once, by arrivals of several kinds."""
