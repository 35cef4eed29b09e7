"""Shared parts of the pruning study, a folder for each stage of the experiment; README.md is the map."""
