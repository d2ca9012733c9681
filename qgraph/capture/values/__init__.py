"""Nested inputs and outputs, how tensors lie in memory, and variants of the example inputs."""
