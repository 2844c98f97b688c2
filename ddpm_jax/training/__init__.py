"""The training step, its randomness, its optimizer, and the loop around it."""
