"""Packages live in two source roots, the repository and `kernels/` (as a package it would shadow Hugging Face's)."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["compressft", "compressft.*"]) + find_packages("kernels"),
    package_dir={"compressft_kernels": "kernels/compressft_kernels"},
    package_data={
        "compressft": ["py.typed", "recipe/shipped/*.yaml", "data/samples/*/*"],
        "compressft_kernels": ["py.typed", "table.json"],
    },
)
