"""What a captured graph does at its entry and exit: the input guard, and rebuilding the output."""
