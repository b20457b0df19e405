"""All links of a model at hand: what verdicts and second opinions start from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from caltrain.accountability.attribution import Attribution
from caltrain.accountability.cases import Dossier, Links
from caltrain.enclave.ingest import record_key
from caltrain.enclave.linkage import LinkageStore, Table
from caltrain.enclave.run import Run, present
from caltrain.plan import Method, RunManifest

MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Evidence:
    """Every link, `head` being that of the linkage store, and what was made from all of them.

    `rows` (N,) are the records' rows in the pool.
    """

    head: str
    table: Table
    rows: Tensor
    dossier: Dossier
    opinions: dict[Method, Attribution] = field(default_factory=dict)


def evidence(run: Run) -> Evidence:
    """Put together for the first question that needs it, kept for as long as no link changes.

    Raises DataError `linkage.too-large`.
    """
    store = present(run.linkage)
    if run.evidence is None or run.evidence.head != store.head:
        run.evidence = _gathered(run, store)
    return run.evidence


def _gathered(run: Run, store: LinkageStore) -> Evidence:
    table, manifest, contents = store.table(run.model_digest, limit=MOST_BYTES), present(run.manifest), run.contents
    party, shard = _places(manifest, table)
    sources = torch.from_numpy(party[table.source].astype(np.int64))
    links = Links(table.fingerprints, table.labels, sources, tuple(own.name for own in manifest.parties))
    rows = present(contents).rows(record_key(party[table.source], shard[table.source], table.leaf))
    return Evidence(store.head, table, rows, Dossier(links, present(contents).in_order(rows)))


def _places(manifest: RunManifest, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Of each shard of a table the number of its party in the manifest, and its own there."""
    number = {
        (party.name, entry.shard): (i, j)
        for i, party in enumerate(manifest.parties)
        for j, entry in enumerate(party.shards)
    }
    places = np.array([number[shard] for shard in table.shards], np.uint32)
    return places[:, 0], places[:, 1]
