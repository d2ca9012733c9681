"""Numbers that follow from the batch size."""
