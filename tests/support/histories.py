"""Histories of a party's runs by hand: estimates as reports would have told them."""

from __future__ import annotations

from collections.abc import Mapping

from caltrain.exposure.figures import Estimate
from caltrain.participant.history import Change, HuntedRun
from caltrain.plan import ManifestParty, ManifestShard, RunManifest
from caltrain.provenance.statements import LinkedModel
from caltrain.records.quarantine import FormerParty, Repair
from caltrain.records.shard import key_id
from support.samples import DATA_KEY, MEASUREMENT, SHARD, plan, signer

DIGEST = "sha256:" + "7" * 64
Share = tuple[float, float, float]


def hunted(
    number: int,
    shares: Mapping[str, Share],
    *,
    parties: tuple[str, ...] = ("alder", "birch", "cedar"),
    changed: tuple[Change, ...] = (),
    left_out: int = 0,
    former: tuple[str, ...] = (),
    simulated: bool = False,
    audit_rate: float = 0.1,
    resumes: int = 0,
) -> HuntedRun:
    """A run of that number: by contributor low, estimate and high; with records or parties left out a repair."""
    run, agreed = f"{number:08x}" + "0" * 24, plan()
    shard = ManifestShard(shard=SHARD, root=DIGEST, records=1200)
    without = tuple(FormerParty(name=name, public_key=signer(name).public) for name in former)
    repair = Repair(run=run, model=DIGEST, quarantine=DIGEST, records=left_out, without=without)
    return HuntedRun(
        plan=agreed,
        manifest=RunManifest(
            run=run,
            plan=agreed.digest(),
            evidence_kind="simulated",
            simulated=simulated,
            measurement=MEASUREMENT,
            enclave_encryption_key="xwing:AAAA",
            enclave_signing_key=signer("enclave").public,
            parties=tuple(ManifestParty(name=name, key_id=key_id(DATA_KEY), shards=(shard,)) for name in parties),
        ),
        linked=LinkedModel(
            run=run,
            model=DIGEST,
            records=3600,
            commitments=DIGEST,
            audit_rate=audit_rate,
            resumes=resumes,
            simulated=simulated,
            repair=repair if left_out or former else None,
        ),
        wrong_labels={name: Estimate(value, low, high, 1200) for name, (low, value, high) in shares.items()},
        changed=changed,
    )
