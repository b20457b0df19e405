"""UNTRUSTED: the machine that launches the enclave, stores sealed bytes and trains the center."""
