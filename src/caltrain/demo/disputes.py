"""Step 10: contributors disclose what a trace names, the auditor checks offline, and a substitute is tried."""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from caltrain.auditor.bundle import TraceBundle, read_bundle, verify_bundle
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import Envelope
from caltrain.demo.steps import USER, Scene
from caltrain.errors import LineageError
from caltrain.plan import RunManifest
from caltrain.project import Project
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure
from caltrain.records.shown import Reading, SealedDisclosure, open_disclosure, seal_disclosure


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
        commands[f"verify-{index}"] = (
            *("verify", _bundle(scene, index), "--plan-digest", digest, *scene.policy),
            *("--home", scene.project.users[USER].folder, *added),
        )
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
                *(*records, "--model", trace.model, "--out", file, "--url", url, "--run", manifest.run),
            )
            files[index].append(file)
    scene.members.run_all(commands)
    return files


def _settled(scene: Scene, trace: TraceStatement, files: list[Path], index: int) -> Dispute:
    bundle = read_bundle(_bundle(scene, index))
    envelopes = [e for file in files for e in msgspec.json.decode(file.read_bytes(), type=list[Envelope])]
    complete = msgspec.structs.replace(bundle, disclosures=tuple(envelopes))
    verified = verify_bundle(complete, **_anchors(scene.project))
    substitutes = [_substitute(scene.project, envelope) for envelope in envelopes]
    refused = sum(_is_refused(bundle, substitute, scene.project) for substitute in substitutes)
    return Dispute(trace, verified.records, len(envelopes), refused)


def _anchors(project: Project) -> dict[str, Any]:
    """What the auditor trusts, and the key of the reader for whom it looks."""
    return {"plan_digest": project.plan.digest(), "policy": project.policy, "reading": _reading(project)}


def _reading(project: Project) -> Reading:
    return Reading(USER, project.users[USER].reading_key())


def _substitute(project: Project, honest: Envelope) -> Envelope:
    """What a contributor would send who wants to hide the record: another one, with a salt and proof to match."""
    sealed = msgspec.json.decode(base64.b64decode(honest.payload), type=SealedDisclosure)
    opened = open_disclosure(sealed, _reading(project))
    disclosure = msgspec.json.decode(base64.b64decode(opened.payload), type=Disclosure)
    record = bytearray(base64.b64decode(disclosure.record))
    record[-1] ^= 0x80  # one pixel
    forged = msgspec.structs.replace(
        disclosure,
        record=base64.b64encode(record).decode(),
        salt=base64.b64encode(os.urandom(32)).decode(),
    )
    reference, signer = disclosure.record_ref, project.parties[disclosure.record_ref.party].signer
    readers = {reader.name: reader.encryption_key for reader in project.plan.trace.disclose_to}
    again = seal_disclosure(signer.sign("disclosure", forged), reference, model=disclosure.model, readers=readers)
    return signer.sign("sealed-disclosure", again)


def _is_refused(bundle: TraceBundle, substitute: Envelope, project: Project) -> bool:
    try:
        verify_bundle(msgspec.structs.replace(bundle, disclosures=(substitute,)), **_anchors(project))
    except LineageError as error:
        return error.code == "disclosure.substituted"
    return False
