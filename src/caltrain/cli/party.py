"""`caltrain party ...`: what a contributor does on its own machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from caltrain.cli import hunt, quality
from caltrain.cli.files import read_plan, read_policy, write_json
from caltrain.cli.judging import judging
from caltrain.cli.output import Format, FormatOption, choose, emit, say, say_simulated
from caltrain.cli.query import missing
from caltrain.crypto.digests import to_raw
from caltrain.errors import LineageError
from caltrain.exposure.figures import BudgetName
from caltrain.files import read_bounded
from caltrain.host_client import HostClient
from caltrain.models.spec import MAX_WHEEL_BYTES
from caltrain.participant.assess import Voted
from caltrain.participant.assess import assess as assess_run
from caltrain.participant.cut import agree_to_cut
from caltrain.participant.disclose import disclose as disclose_record
from caltrain.participant.disclose import note_disclosure
from caltrain.participant.disclose import refuse as refuse_record
from caltrain.participant.heads import known_run
from caltrain.participant.identity import create_identity, load_identity
from caltrain.participant.join import join as join_run
from caltrain.participant.rejoin import rejoin as rejoin_run
from caltrain.participant.seal import DEFAULT_SHARD_RECORDS, plan_labels, seal_records
from caltrain.plan import Reader
from caltrain.records.commitment import RecordRef

app = typer.Typer(help="A contributor: keys, sealing, joining a run, disclosure.", no_args_is_help=True)
app.command()(hunt.hunt)
app.command()(quality.quality)
HomeOption = Annotated[Path, typer.Option(help="the party's folder")]
PlanOption = Annotated[Path, typer.Option(help="plan.toml")]
PolicyOption = Annotated[Path, typer.Option(help="policy.toml: which enclaves this party accepts")]


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="small letters, digits, hyphens")],
    home: HomeOption,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Make the keys of a party or a model user."""
    choose(format_)
    emit(create_identity(home, name).public, title="For the plan")


@app.command()
def reader(
    home: Annotated[Path, typer.Option(help="the folder of a party, a model user or an auditor")],
    format_: FormatOption = Format.TEXT,
) -> None:
    """The entry under trace.disclose_to with which a plan has records disclosed to this identity."""
    choose(format_)
    identity = load_identity(home)
    emit(Reader(name=identity.name, encryption_key=identity.reading_key().public), title="For the plan")


@app.command()
def seal(
    home: HomeOption,
    plan: PlanOption,
    data: Annotated[Path, typer.Option(help=".npz, idx folder, Parquet folder or folder of images per class")],
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="leave out exact copies")] = False,
    shard_records: Annotated[int, typer.Option(min=1, help="records of one shard")] = DEFAULT_SHARD_RECORDS,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="its test part instead: never trained on, measured after each epoch")
    ] = False,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Seal the training part of a data set into the party's folder; with --held-out, its test part."""
    from caltrain.records.readers import open_path  # noqa: PLC0415  # keeps the other commands quick

    choose(format_)
    agreed, identity = read_plan(plan), load_identity(home)
    split = open_path(data)
    part = split.test if held_out else split.train
    labels = plan_labels(part, agreed.data)
    sealed = seal_records(
        identity,
        agreed.data,
        part.images,
        labels,
        drop_duplicates=drop_duplicates,
        shard_records=shard_records,
        held_out=held_out,
    )
    emit(
        {
            "party": identity.name,
            "shards": [{"shard": header.shard, "records": header.records} for header in sealed.headers],
            "records": sum(header.records for header in sealed.headers),
            "dropped": len(sealed.dropped),
            "held_out": held_out,
        },
        title="Sealed",
    )


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="the host, such as http://127.0.0.1:8000")],
    home: HomeOption,
    plan: PlanOption,
    policy: PolicyOption,
    timeout: Annotated[float, typer.Option(help="seconds to wait for each phase")] = 86_400,
    allow_second_manifest: Annotated[
        bool, typer.Option("--allow-second-manifest", help="this plan may run again; all parties must agree to that")
    ] = False,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Take part in a run: approve, send shards, verify the enclave, hand over the key, countersign, get the model."""
    choose(format_)
    identity = load_identity(home)
    with HostClient(url) as host:
        manifest = join_run(
            host,
            read_plan(plan),
            identity,
            read_policy(policy),
            clock=lambda: datetime.now(UTC),
            seconds=timeout,
            allow_second_manifest=allow_second_manifest,
            on_step=lambda text: say(f"{identity.name}: {text}"),
        )
    if manifest.simulated:
        say_simulated()
    folder = home / "runs" / manifest.run
    emit({"party": identity.name, "run": manifest.run, "folder": str(folder), "simulated": manifest.simulated})


@app.command()
def disclose(
    home: HomeOption,
    plan: PlanOption,
    record: Annotated[list[str], typer.Option("--record", help="SHARD:LEAF of a traced record; repeat")],
    model: Annotated[str, typer.Option(help="the digest of the model that was traced")],
    out: Annotated[Path, typer.Option(help="where to write what was signed")],
    refuse: Annotated[bool, typer.Option("--refuse", help="sign that these records will not be disclosed")] = False,
    url: Annotated[str, typer.Option(help="the host, to note it in the chain of this run")] = "",
    run: Annotated[str, typer.Option(help="the run's id, with --url")] = "",
    format_: FormatOption = Format.TEXT,
) -> None:
    """Lay open single records: bytes, salt and inclusion proof, signed, and sealed to the readers that the plan names.

    Where it names none they are in clear: read them before you hand them on.
    """
    choose(format_)
    if bool(url) != bool(run) or (url and refuse):
        raise missing("--url and --run belong together, to note in the chain what is disclosed; a refusal is not noted")
    agreed, identity = read_plan(plan), load_identity(home)
    to_raw(model)
    references = [_reference(identity.name, text) for text in record]
    if refuse:
        write_json(out, [refuse_record(identity, reference, model=model) for reference in references])
        emit({"party": identity.name, "refused": len(references), "file": str(out)}, title="Refused")
        return
    disclosed = [disclose_record(identity, agreed, reference, model=model) for reference in references]
    if url:
        known_run(identity, run)
        with HostClient(url) as host:
            for _, commitment in disclosed:
                note_disclosure(host, identity, run=run, commitment=commitment)
    signed = [envelope for envelope, _ in disclosed]
    write_json(out, signed)
    readers = [reader.name for reader in agreed.trace.disclose_to]
    emit(
        {"party": identity.name, "disclosed": len(signed), "file": str(out), "readers": readers or ["anybody"]},
        title="Disclosed",
    )


def _reference(party: str, text: str) -> RecordRef:
    shard, _, leaf = text.partition(":")
    if not leaf.isdecimal():
        raise LineageError("disclose.reference", f"{text[:80]!r}", step="read --record", fix="Write SHARD:LEAF.")
    return RecordRef(party, shard, int(leaf))


@app.command()
def rejoin(
    url: Annotated[str, typer.Argument(help="the host, served with --resume")],
    home: HomeOption,
    plan: PlanOption,
    policy: PolicyOption,
    timeout: Annotated[float, typer.Option(help="seconds to wait until the host asks")] = 3600,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Let an interrupted run go on: verify the new enclave and the chain, then give this party's word."""
    choose(format_)
    identity = load_identity(home)
    with HostClient(url) as host:
        agreed, accepted = read_plan(plan), read_policy(policy)
        given = rejoin_run(host, agreed, identity, accepted, clock=lambda: datetime.now(UTC), seconds=timeout)
    if given is None:
        emit({"party": identity.name, "given": False}, title="The host waits for no word of this party's")
        return
    if given.simulated:
        say_simulated()
    if given.words > 1:
        say(f"word number {given.words} for one head: the former enclave may still live")
    emit(
        {
            "party": identity.name,
            "given": True,
            "run": given.run,
            "goes_on_at": f"epoch {given.at[0]}, step {given.at[1]}" if given.at else "before training",
            "events": given.events,
            "head": given.head,
            "resumed_before": given.resumed,
            "stopped_by_itself": given.stopped,
            "word": given.words,
            "simulated": given.simulated,
        },
        title="Word given",
    )


@app.command()
def assess(
    url: Annotated[str, typer.Argument(help="the host")],
    home: HomeOption,
    plan: PlanOption,
    budget: Annotated[BudgetName, typer.Option(help="how much the attacks may compute")] = "quick",
    front: Annotated[int, typer.Option(min=0, help="the shallowest FrontNet that this party accepts at all")] = 0,
    wheel: Annotated[Path | None, typer.Option(help="the wheel of stages that the plan names")] = None,
    once: Annotated[bool, typer.Option("--once", help="vote once, and do not wait for the next epochs")] = False,
    timeout: Annotated[float, typer.Option(help="seconds to wait for each assessment")] = 86_400,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Before each epoch: attack the semi-trained model with this party's own records, and vote on the cut."""
    choose(format_)
    identity, agreed = load_identity(home), read_plan(plan)
    stages = read_bounded(wheel, limit=MAX_WHEEL_BYTES) if wheel else None
    given: list[Voted] = []
    with HostClient(url) as host, judging(budget, wheel=stages) as judge:
        while not (once and given):
            voted = assess_run(host, agreed, identity, judge=judge, least=front, seconds=timeout)
            if voted is None:
                break
            if voted.statement.simulated and not given:
                say_simulated()
            given.append(voted)
            say(f"{identity.name}: before epoch {voted.epoch + 1} voted for {voted.front or 'no'} layers inside")
    votes = [{"epoch": vote.epoch, "front": vote.front, "model": vote.statement.model} for vote in given]
    simulated = any(vote.statement.simulated for vote in given)
    emit({"party": identity.name, "votes": votes, "simulated": simulated}, title="Votes")


@app.command("agree-cut")
def agree_cut(
    url: Annotated[str, typer.Argument(help="the host")],
    home: HomeOption,
    plan: PlanOption,
    front: Annotated[int, typer.Option(min=0, help="layers of the FrontNet that this party agrees to")],
    timeout: Annotated[float, typer.Option(help="seconds to wait until the run asks")] = 3600,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Agree that the FrontNet becomes shallower: layers that were trained inside go out to the host, in clear."""
    choose(format_)
    identity = load_identity(home)
    with HostClient(url) as host:
        head = agree_to_cut(host, read_plan(plan), identity, front=front, seconds=timeout)
    emit({"party": identity.name, "front": front, "head": head}, title="Agreed")
