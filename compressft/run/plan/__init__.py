"""What a run will take, from its recipe's shapes."""
