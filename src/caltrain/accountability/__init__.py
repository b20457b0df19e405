"""Mathematics of accountability: distances, suspicion. No keys, no I/O."""
