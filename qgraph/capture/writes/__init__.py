"""Writes in place made pure."""
