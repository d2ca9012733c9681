"""Running the forward and writing down what it does; symbolic tracing."""
