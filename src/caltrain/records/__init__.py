"""Records: schema, canonical bytes, commitments, sealed shards, readers of public formats."""
