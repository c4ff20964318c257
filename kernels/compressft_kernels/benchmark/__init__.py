"""Measures the operators: correctness first, then time, memory and share of the roofline. Imported by no other part."""
