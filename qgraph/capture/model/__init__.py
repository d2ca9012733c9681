"""The user's model: names, source lines, copies, and what a forward may change."""
