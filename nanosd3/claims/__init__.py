"""Claims of papers put to the test.

Each experiment says before it runs what is claimed, what is measured and which rule decides.

Modules, each of which imports only from those above it:
    experiment          what an experiment is, and the words of a verdict
    fm_identity         x-fm-0: the loss of Flow Matching
    fm_straightness     x-fm-3: how straight paths are
    catalogue           all experiments by name
    records             run one, and keep what it said and found
    page                README.md, built from the records
    __main__            the command line
"""
