"""Reports over finished and unfinished runs: tables, figures, paired comparisons.

This package reads run directories and nothing else. Only the margins of paired comparisons start an
engine.
"""
