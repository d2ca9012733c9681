"""What a caller of `trace` asks for: leaves, waivers, and the checked request."""
