"""Adapter folders of the `adapters` package (AdapterHub): bottlenecks, fusions of them, prefixes."""
