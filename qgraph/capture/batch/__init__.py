"""Freeing the batch size: a second recording, merged with the first."""
