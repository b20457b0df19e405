"""What adversaries do with what crosses a cut. Never imported by the enclave."""
