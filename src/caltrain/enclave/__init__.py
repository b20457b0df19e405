"""TRUSTED: the program that runs inside the enclave, and the lock it puts on itself."""
