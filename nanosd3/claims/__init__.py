"""Claims of papers put to the test.

Each experiment says before it runs what is claimed, what is measured and which rule decides.

Modules, each of which imports only from those above it:
"""
