"""What is written of a model: whole, as what training changed, as adapters and task vectors."""
