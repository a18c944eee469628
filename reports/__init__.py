"""Reports over finished and unfinished runs: tables, figures, paired comparisons.

Reads run directories and nothing else; only the margins of paired comparisons start an engine.
"""
