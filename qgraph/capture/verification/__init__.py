"""The graph replayed against its model."""
