"""What several passes use."""
