"""Measurements that anybody can repeat: paired and interleaved in one process, each with its spread.

`harness` times pieces of work side by side. `sealing` compares our shards with raw AES-GCM and with encrypted
Parquet: `ways` is the work that is timed, `tampering` damages files and counts what is noticed, `formats` writes
and reads both kinds of file.
"""
