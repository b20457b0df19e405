"""Measurements that anybody can repeat: paired and interleaved in one process, each with its spread.

`harness` times named pieces of work side by side, `sealing` compares sealed shards with raw AES-GCM and with
encrypted Parquet, `tampering` damages sealed files and counts what is noticed, `parquet` writes and reads the
encrypted Parquet that both use.
"""
