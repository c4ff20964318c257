"""Data: files, hub data sets and shipped samples become rows."""
