"""A model user: asks for predictions and traces, sealed to an enclave that it has verified."""
