"""What owner, enclave, host and users of a served model agree on: package, session, protocol. Needs no torch."""
