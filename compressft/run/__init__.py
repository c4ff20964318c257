"""Runs: the flow from a recipe to a report, and what the command line does besides."""
