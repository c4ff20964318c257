"""What models answer, and how good that is."""
