"""Evidence and its appraisal (RFC 9334 roles): policy, one verifier for each technology, measurement."""
