"""The demonstration: a scenario with a planted culprit, told with the same commands that people use."""
