"""Step 10: contributors disclose what a trace names, the auditor checks offline, and a substitute is tried."""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from caltrain.auditor.bundle import TraceBundle, read_bundle, verify_bundle
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import Envelope
from caltrain.demo.steps import Scene
from caltrain.errors import LineageError
from caltrain.plan import RunManifest
from caltrain.project import Project
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure


@dataclass(frozen=True)
class Dispute:
    """One trace, its disclosed records (canonical bytes), and how many substitutes were tried and refused."""

    trace: TraceStatement
    records: dict[RecordRef, bytes]
    substitutes: int
    refused: int


def settle(scene: Scene, manifest: RunManifest, traces: list[TraceStatement], url: str) -> list[Dispute]:
    """Have every record behind `traces` disclosed by its contributor, and verify each bundle with them."""
    files = _disclose(scene, manifest, traces, url)
    digest = scene.project.plan.digest()
    commands: dict[str, Sequence[str | Path]] = {}
    for index in range(len(traces)):
        added = [word for file in files[index] for word in ("--disclosures", file)]
        commands[f"verify-{index}"] = ("verify", _bundle(scene, index), "--plan-digest", digest, *added)
    scene.members.run_all(commands)
    return [_settled(scene, trace, files[index], index) for index, trace in enumerate(traces)]


def _bundle(scene: Scene, index: int) -> Path:
    return scene.folder / "traces" / f"bundle-{index}.json"


def _disclose(scene: Scene, manifest: RunManifest, traces: list[TraceStatement], url: str) -> dict[int, list[Path]]:
    """Files of disclosures for each trace."""
    files: dict[int, list[Path]] = defaultdict(list)
    commands: dict[str, Sequence[str | Path]] = {}
    for index, trace in enumerate(traces):
        for party in sorted({n.record.party for n in trace.neighbours}):
            file = scene.folder / "disclosures" / f"{index}-{party}.json"
            own = [n.record for n in trace.neighbours if n.record.party == party]
            records: list[str | Path] = [word for r in own for word in ("--record", f"{r.shard}:{r.leaf}")]
            commands[f"disclose-{index}-{party}"] = (
                *("party", "disclose", "--home", scene.project.parties[party].folder, *scene.plan),
                *(*records, "--out", file, "--url", url, "--run", manifest.run),
            )
            files[index].append(file)
    scene.members.run_all(commands)
    return files


def _settled(scene: Scene, trace: TraceStatement, files: list[Path], index: int) -> Dispute:
    bundle = read_bundle(_bundle(scene, index))
    envelopes = [e for file in files for e in msgspec.json.decode(file.read_bytes(), type=list[Envelope])]
    digest = scene.project.plan.digest()
    complete = msgspec.structs.replace(bundle, disclosures=tuple(envelopes))
    verified = verify_bundle(complete, plan_digest=digest)
    refused = sum(_is_refused(bundle, _substitute(scene.project, envelope), digest) for envelope in envelopes)
    return Dispute(trace, verified.records, len(envelopes), refused)


def _substitute(project: Project, honest: Envelope) -> Envelope:
    """What a contributor would send who wants to hide the record: another one, with a salt and proof to match."""
    disclosure = msgspec.json.decode(base64.b64decode(honest.payload), type=Disclosure)
    record = bytearray(base64.b64decode(disclosure.record))
    record[-1] ^= 0x80  # one pixel
    forged = msgspec.structs.replace(
        disclosure,
        record=base64.b64encode(record).decode(),
        salt=base64.b64encode(os.urandom(32)).decode(),
    )
    return project.parties[disclosure.record_ref.party].signer.sign("disclosure", forged)


def _is_refused(bundle: TraceBundle, substitute: Envelope, digest: str) -> bool:
    try:
        verify_bundle(msgspec.structs.replace(bundle, disclosures=(substitute,)), plan_digest=digest)
    except LineageError as error:
        return error.code == "disclosure.substituted"
    return False
