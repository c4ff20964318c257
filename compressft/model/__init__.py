"""Models: where their parts are, how they are loaded, changed, counted and saved."""
