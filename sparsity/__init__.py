"""Shared parts of the pruning study: every module is one noun of the field and takes a model, none builds one."""
