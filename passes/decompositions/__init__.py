"""Rules that take composites apart, by subject; the passes `decompose-layers` and `decompose-composites` apply them."""
