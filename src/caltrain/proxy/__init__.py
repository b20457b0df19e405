"""A verifying proxy on the user's machine: plain Open Inference Protocol in front, a verified enclave behind."""
