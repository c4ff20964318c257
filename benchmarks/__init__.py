"""Evidence that needs the repository: `python -m benchmarks NAME`. Long ones cache each run and resume."""
