"""Recipes: one YAML file says what is trained, what gets smaller and what is exported."""
