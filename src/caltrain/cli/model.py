"""`caltrain model ...`: the owner of a model that others serve."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from caltrain.attestation.verify import Claims
from caltrain.cli.files import read_key, read_policy, read_public, write_json
from caltrain.cli.output import Format, FormatOption, choose, emit, say, say_simulated
from caltrain.errors import ConfigError
from caltrain.files import read_bounded
from caltrain.host_client import HostClient
from caltrain.models.spec import MAX_WHEEL_BYTES
from caltrain.participant.identity import load_identity
from caltrain.serving.folder import open_folder
from caltrain.serving.package import (
    Across,
    BatchSpec,
    ExposureBasis,
    Package,
    ServedUser,
    Terms,
    UserCredential,
    refuse,
)

app = typer.Typer(help="The owner of a served model: package it, hand over its key.", no_args_is_help=True)
HomeOption = Annotated[Path, typer.Option(help="the owner's folder (`caltrain party keygen`)")]
PackageArgument = Annotated[Path, typer.Argument(help="a package's folder")]
UserOption = Annotated[list[str], typer.Option(help="IDENTITY.JSON:RECORDS, who may ask about how many; repeat")]
_PAUSE_SECONDS, _TRIES = 0.5, 240


@app.command()
def package(
    model: Annotated[Path, typer.Argument(help="a joined run, a folder with model.json, or a Darknet .cfg")],
    home: HomeOption,
    name: Annotated[str, typer.Option(help="what clients ask for")],
    cut: Annotated[int, typer.Option(min=1, help="layers of the FrontNet")],
    out: Annotated[Path, typer.Option(help="folder for the package")],
    user: UserOption = [],  # noqa: B006
    issuer: Annotated[str, typer.Option(help="key or identity.json of who names further users")] = "",
    head: Annotated[int, typer.Option(min=0, help="layers of the HeadNet: ternary form")] = 0,
    mapped: Annotated[bool, typer.Option("--mapped", help="keep secret which output is which class")] = False,
    exposure: Annotated[Path | None, typer.Option(help="folder of the signed assessment of this model")] = None,
    exposure_key: Annotated[str, typer.Option(help="key or identity.json of who signed it; default: the owner")] = "",
    unassessed: Annotated[bool, typer.Option("--unassessed", help="without one: nobody knows what leaks")] = False,
    revision: Annotated[int, typer.Option(min=1, help="the version that clients see")] = 1,
    rows: Annotated[int, typer.Option(min=1, max=256, help="most records of a batch, and of a request")] = 32,
    fixed: Annotated[bool, typer.Option("--fixed", help="always compute so many, padded: equal bits")] = False,
    delay_ms: Annotated[float, typer.Option(min=0, help="how long a record may wait for company")] = 0.0,
    across: Annotated[Across, typer.Option(help="precision at the cuts")] = "f32",
    center: Annotated[Literal["cpu", "any"], typer.Option(help="where the CenterNet may run")] = "cpu",
    audit: Annotated[float, typer.Option(min=0, max=1, help="share of batches computed again inside")] = 0.0,
    top: Annotated[int, typer.Option(min=0, help="answer only so many of the probabilities; 0: all")] = 0,
    measurement: Annotated[str, typer.Option(help="program to trust; default: the one installed here")] = "",
    weights: Annotated[Path | None, typer.Option(help="of a .cfg: .weights or .safetensors")] = None,
    wheel: Annotated[Path | None, typer.Option(help="the wheel of stages that the model names")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Split a model for serving: FrontNet, HeadNet and class names sealed, CenterNet in clear, a signed manifest."""
    choose(format_)
    if (exposure is None) != unassessed:
        raise ConfigError(
            "package.basis",
            "give either the assessment that the cut rests on, or say that there is none",
            step="package model",
            fix="Run `caltrain exposure assess MODEL --sign HOME` and give --exposure, or say --unassessed.",
        )
    owner, users = load_identity(home), tuple(map(_user, user))

    from caltrain.attestation.measurement import measure_enclave  # noqa: PLC0415  # torch
    from caltrain.exposure.open_model import open_subject  # noqa: PLC0415
    from caltrain.owner.basis import read_basis  # noqa: PLC0415
    from caltrain.owner.package import package_model  # noqa: PLC0415

    code = read_bounded(wheel, limit=MAX_WHEEL_BYTES) if wheel else b""
    subject = open_subject(model, weights=weights, wheel=code or None)
    key = read_key(exposure_key) if exposure_key else owner.signer.public
    basis = read_basis(exposure, model=subject.digest, key=key, front=cut) if exposure else None
    terms = _terms(
        name=name,
        revision=revision,
        front=cut,
        head=head,
        mapped=mapped,
        across=across,
        center=center,
        audit=audit,
        top=top or None,
        batch=BatchSpec(rows=rows, fixed=fixed, delay_ms=delay_ms),
        users=users,
        issuer=read_key(issuer) if issuer else None,
        measurement=measurement or measure_enclave(),
        exposure=basis,
    )
    made = package_model(subject, terms, signer=owner.signer, data_key=owner.data_key, folder=out, wheel=code)
    _say_basis(made.terms.exposure)
    emit(_summary(made), title=f"Package in {out}")


@app.command()
def show(
    folder: PackageArgument,
    owner: Annotated[str, typer.Option(help="key or identity.json of who must have signed it")] = "",
    format_: FormatOption = Format.TEXT,
) -> None:
    """Check a package's signature and parts, and say what it promises."""
    choose(format_)
    opened = open_folder(folder, read_key(owner) if owner else None)
    _say_basis(opened.package.terms.exposure)
    if not owner:
        say("signed by the owner that it names itself; give --owner to check whose it is")
    emit(_summary(opened.package), title="Package")


@app.command()
def grant(
    url: Annotated[str, typer.Argument(help="the serving host")],
    folder: PackageArgument,
    home: HomeOption,
    policy: Annotated[Path, typer.Option(help="policy.toml: which enclaves the owner accepts")],
    watch: Annotated[int, typer.Option(min=0, help="then again whenever it was restarted, at most so often")] = 0,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Verify the serving enclave's evidence and hand it the package's key. All budgets begin anew with it."""
    from caltrain.owner.grant import await_enclave, watch_enclave  # noqa: PLC0415  # torch
    from caltrain.owner.grant import grant as hand_over  # noqa: PLC0415

    choose(format_)
    owner, accepted = load_identity(home), read_policy(policy)
    given = open_folder(folder, owner.signer.public).package

    def pause() -> None:
        time.sleep(_PAUSE_SECONDS)

    def told(claims: Claims) -> None:
        if claims.simulated:
            say_simulated()
        say(f"key of {given.terms.name} revision {given.terms.revision} handed over")

    with HostClient(url) as host:
        again = partial(
            hand_over,
            host,
            given,
            accepted,
            signer=owner.signer,
            data_key=owner.data_key,
            clock=lambda: datetime.now(UTC),
        )
        await_enclave(host, given, tries=_TRIES, pause=pause)
        claims = again()
        told(claims)
        watch_enclave(host, given, again, at_most=watch, pause=pause, on_grant=told)
    emit({"package": given.digest(), "measurement": claims.measurement, "simulated": claims.simulated}, title="Granted")


@app.command()
def credential(
    folder: PackageArgument,
    home: Annotated[Path, typer.Option(help="the issuer's folder")],
    user: Annotated[str, typer.Option(help="IDENTITY.JSON:RECORDS")],
    out: Annotated[Path, typer.Option(help="file for the credential")],
    format_: FormatOption = Format.TEXT,
) -> None:
    """As a package's issuer, sign that a user may ask."""
    choose(format_)
    issuer, named = load_identity(home), open_folder(folder).package
    if named.terms.issuer != issuer.signer.public:
        raise ConfigError(
            "credential.not-issuer",
            f"{issuer.name} is not the issuer that the package names",
            step="issue credential",
            fix="Sign with the issuer's key, or have the owner name this one in a new package.",
        )
    signed = UserCredential(package=named.digest(), user=_user(user))
    write_json(out, issuer.signer.sign("user-credential", signed))
    emit({"user": signed.user.name, "records": signed.user.budget, "file": str(out)}, title="Credential")


def _terms(**fields: object) -> Terms:
    try:
        return msgspec.convert(msgspec.to_builtins(fields), Terms)
    except msgspec.ValidationError as error:
        raise refuse("package.invalid", f"the terms were refused: {error}") from None


def _user(text: str) -> ServedUser:
    path, _, records = text.rpartition(":")
    identity = read_public(Path(path))
    try:
        fields = {"name": identity.name, "public_key": identity.public_key, "budget": int(records)}
        return msgspec.convert(fields, ServedUser)
    except ValueError as error:
        raise ConfigError(
            "package.user",
            f"{text[:200]!r} does not say how many records the user may ask about: {str(error)[:200]}",
            step="read user",
            fix="Give the user's identity.json, a colon and a number of records, such as una/identity.json:10000.",
        ) from None


def _say_basis(basis: ExposureBasis | None) -> None:
    if basis is None:
        say("not assessed: nobody measured what this cut gives away")
    elif not basis.policy_met:
        say("the assessment's policy does not choose this cut, nor a shallower one")


def _summary(package: Package) -> dict[str, object]:
    terms = package.terms
    return {
        "name": terms.name,
        "revision": terms.revision,
        "package": package.digest(),
        "owner": package.owner,
        "model": package.model,
        "form": package.form,
        "cut": terms.front,
        "head": terms.head,
        "class_order_secret": terms.mapped,
        "across": terms.across,
        "center_audited": terms.audit,
        "batch": terms.batch.rows,
        "fixed_batches": terms.batch.fixed,
        "users": [f"{user.name}: {user.budget}" for user in terms.users],
        "issuer": terms.issuer,
        "measurement": terms.measurement,
        "assessed": terms.exposure is not None,
        "policy_met": terms.exposure.policy_met if terms.exposure else None,
    }
