"""The chain of signed events of a run, and statements about its results."""
