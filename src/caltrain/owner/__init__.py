"""The owner of a served model: splits and seals it, verifies the serving enclave, hands it the key."""
