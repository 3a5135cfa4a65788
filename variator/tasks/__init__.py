"""Tasks with labels: what they are, how they are read, and the official scores. No model, no torch."""
