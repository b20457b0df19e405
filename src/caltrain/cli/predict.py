"""`caltrain predict`: by a served model, by the enclave of a training run, or by a joined model on this machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from caltrain.cli.files import read_inputs, read_key, read_policy
from caltrain.cli.output import Format, FormatOption, choose, emit, say_simulated
from caltrain.cli.query import ask_enclave, missing
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, envelope_from_json
from caltrain.files import read_bounded
from caltrain.models.spec import MAX_WHEEL_BYTES
from caltrain.participant.identity import load_identity

HomeOption = Annotated[Path | None, typer.Option(help="the model user's folder")]
PolicyOption = Annotated[Path | None, typer.Option(help="policy.toml: which enclaves this user accepts")]
OwnerOption = Annotated[str, typer.Option(help="key or identity.json of the model's owner, from the owner")]
ModelOption = Annotated[str, typer.Option(help="the served model's name")]
VersionOption = Annotated[str, typer.Option(help="its version; default: the newest")]
CredentialOption = Annotated[Path | None, typer.Option(help="of the package's issuer, if it does not name this user")]


class _Found(NamedTuple):
    classes: list[str]
    probabilities: list[float]
    simulated: bool
    more: dict[str, object]


def predict(
    target: Annotated[str, typer.Argument(help="a host's address, or the run folder of a joined model")],
    files: Annotated[list[Path], typer.Argument(help=".npy of (N, C, H, W) or (C, H, W), or PNG and JPEG pictures")],
    model: ModelOption = "",
    owner: OwnerOption = "",
    version: VersionOption = "",
    credential: CredentialOption = None,
    home: HomeOption = None,
    policy: PolicyOption = None,
    plan: Annotated[Path | None, typer.Option(help="of a training host: plan.toml")] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="of a joined model: the wheel of stages that its plan names")
    ] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Predict: sealed, by a served model (--model, --owner, --home, --policy) or the enclave of a training run
    (--plan, --home, --policy); or here, by a joined model.
    """
    choose(format_)
    inputs = read_inputs(files)
    if "://" not in target:
        found = _joined(Path(target), inputs, wheel)
    elif plan is not None:
        found = _of_run(target, inputs, home, plan, policy)
    else:
        found = _served(target, inputs, model, owner, version, credential, home, policy)
    if found.simulated:
        say_simulated()
    best = [round(p, 6) for p in found.probabilities]
    emit(
        {"predicted": found.classes, "probability": best, "simulated": found.simulated, **found.more},
        title="Predictions",
    )


def _joined(folder: Path, inputs: NDArray[np.generic], wheel: Path | None) -> _Found:
    from caltrain.participant.model import load_model  # noqa: PLC0415  # torch, only where it is needed

    joined = load_model(folder, wheel=read_bounded(wheel, limit=MAX_WHEEL_BYTES) if wheel else None)
    numbers, probabilities = joined.predict(inputs)
    classes = [joined.plan.data.classes[int(number)] for number in numbers]
    return _Found(classes, probabilities.max(1).tolist(), joined.record.manifest.simulated, {})


def _of_run(url: str, inputs: NDArray[np.generic], home: Path | None, plan: Path | None, policy: Path | None) -> _Found:
    answered, agreed = ask_enclave("predict", inputs, url, home, plan, policy)
    classes = [agreed.data.classes[number] for number in answered.answers.predicted]
    return _Found(classes, [max(row) for row in answered.answers.scores], answered.claims.simulated, {})


def _served(
    url: str,
    inputs: NDArray[np.generic],
    model: str,
    owner: str,
    version: str,
    credential: Path | None,
    home: Path | None,
    policy: Path | None,
) -> _Found:
    if not model or not owner or home is None or policy is None:
        raise missing(
            "--model, --owner, --home and --policy are needed to ask a served model, --plan for a run's enclave"
        )
    from caltrain.client.served import Expectations, ServedModel  # noqa: PLC0415

    user = load_identity(home)
    expected = Expectations(
        owner=read_key(owner),
        policy=read_policy(policy),
        user=user.name,
        signer=user.signer,
        credential=read_credential(credential),
    )
    with ServedModel.connect(url, model, expected, version=version or None, clock=lambda: datetime.now(UTC)) as served:
        got = served.predict(inputs)
        more: dict[str, object] = {
            "form": served.package.form,
            "cut_assessed": served.package.terms.exposure is not None,
            "center_audited": got.audited,
            "center_wrong": got.center_wrong,
            "budget_left": got.budget_left,
            "package": served.package.digest(),
        }
        return _Found(got.classes, got.probabilities.max(1).tolist(), served.claims.simulated, more)


def read_credential(path: Path | None) -> Envelope | None:
    """An issuer's credential, if there is one."""
    if path is None:
        return None
    return envelope_from_json(read_bounded(path, limit=MAX_ENVELOPE_BYTES), step="read credential")
