"""Training as enclave, center and plain loop share it: seeds, augmentation, optimiser, schedule, one step."""
