"""The host's side of confidential inference: launches serving enclaves, batches sealed requests, runs CenterNets."""
