"""What objective `distill` is made of."""
