"""Faults planted in the package, and the program that plants them."""
