"""The only door between enclave and host: typed messages, tensors, framing, and the shared-memory ring."""
