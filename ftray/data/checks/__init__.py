"""Checks over all records of a data set: duplicates, contamination of training by eval data, labels, quality."""
