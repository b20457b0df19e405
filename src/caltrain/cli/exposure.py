"""`caltrain exposure ...`: what each cut of a model gives away, and the cut chosen by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from caltrain.cli.files import write_json
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say, wants_json
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, envelope_from_json
from caltrain.errors import ConfigError
from caltrain.exposure.defence_spec import parse_defence
from caltrain.exposure.figures import BudgetName
from caltrain.exposure.policy import Policy, check_policy, parse_policy
from caltrain.files import read_bounded
from caltrain.models.spec import MAX_WHEEL_BYTES
from caltrain.participant.identity import load_identity
from caltrain.plan import MAX_PLAN_BYTES, parse_toml

app = typer.Typer(help="Measure what each cut of a model gives away, and choose the cut by it.", no_args_is_help=True)
ModelArgument = Annotated[Path, typer.Argument(help="a joined run, a folder with model.json, or a Darknet .cfg")]
WeightsOption = Annotated[Path | None, typer.Option(help="of a .cfg: .weights or .safetensors")]
WheelOption = Annotated[Path | None, typer.Option(help="the wheel of stages that the model names")]


@app.command()
def assess(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="digits, mnist, cifar10, pneumoniamnist, or a path")],
    data_dir: Annotated[Path | None, typer.Option(help="where a named data set lies; digits need none")] = None,
    weights: WeightsOption = None,
    wheel: WheelOption = None,
    attacks: Annotated[str, typer.Option(help="with commas")] = "kl,whitebox,inverter,shadow,labels",
    cuts: Annotated[str, typer.Option(help="layers in front, with commas, or all")] = "all",
    validator: Annotated[
        str, typer.Option(help="a model that judges maps, or generator: the model itself; default: one is trained")
    ] = "",
    targets: Annotated[int, typer.Option(min=8, help="pictures of others to reconstruct")] = 64,
    candidates: Annotated[int, typer.Option(min=8, help="pictures among which the true one is looked for")] = 1000,
    own: Annotated[int, typer.Option(min=8, help="at most so many pictures are the adversary's")] = 20_000,
    kl_inputs: Annotated[int, typer.Option(min=8, help="pictures whose maps the validator is shown")] = 256,
    maps: Annotated[str, typer.Option(help="maps of each tensor to show, or all")] = "64",
    budget: Annotated[BudgetName, typer.Option(help="how much the attacks may compute")] = "quick",
    tolerance: Annotated[float, typer.Option(min=0, help="KL ratio from which on the papers call a cut safe")] = 1.0,
    policy: Annotated[str, typer.Option(help="such as reidentification<=0.02, inverter.ssim<=0.3, kl_ratio>=1")] = "",
    policy_file: Annotated[Path | None, typer.Option(help="TOML with [exposure.policy], as plans, or [policy]")] = None,
    defence: Annotated[list[str], typer.Option(help="noise=0.5, keep=0.25, bits=4 at the chosen cut; repeat")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="of draws and attacks")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="threads that compute")] = 2,
    out: Annotated[Path, typer.Option(help="folder for report.json and report.html")] = Path("caltrain-exposure"),
    sign: Annotated[Path | None, typer.Option(help="a party's or user's folder: its key signs the report")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Attack every cut, and say what comes back, what it costs, and which cut keeps to a policy."""
    choose(format_)
    agreed = _policy(policy, policy_file)
    numbers = _numbers(cuts, "--cuts"), _numbers(maps, "--maps")
    if len(numbers[1]) > 1:
        raise _no_numbers(maps, "--maps")
    defences = tuple(parse_defence(text) for text in defence)
    identity = load_identity(sign) if sign else None  # asked for before hours are spent

    from caltrain.cli.exposing import Source, Validating, assessed, ticking  # noqa: PLC0415  # torch
    from caltrain.exposure.asked import Asked  # noqa: PLC0415
    from caltrain.exposure.statement import sign_report  # noqa: PLC0415
    from caltrain.reports.exposure import write_exposure  # noqa: PLC0415
    from caltrain.reports.exposure_text import print_exposure  # noqa: PLC0415

    asked = Asked(
        attacks=tuple(dict.fromkeys(name.strip() for name in attacks.split(",") if name.strip())),
        cuts=numbers[0],
        budget=budget,
        maps=numbers[1][0] if numbers[1] else None,
        kl_inputs=kl_inputs,
        tolerance=tolerance,
        seed=seed,
        policy=agreed,
        defences=defences,
    )
    source = Source(model, weights, _wheel(wheel), data, data_dir, targets, candidates, own)
    with ticking() as tick:
        validating = Validating(validator, out / "validator", threads)
        report, gallery = assessed(source, asked, validating, on_step=tick)
    write_json(out / "report.json", report)
    write_exposure(out / "report.html", report, gallery)
    if identity is not None:
        write_json(out / "statement.json", sign_report(report, identity.signer))
    if wants_json():
        emit(report)
        return
    print_exposure(report, console)
    if validating.trained:
        say(f"a validator was trained: reuse it with --validator {validating.folder}")
    say(f"report: {out / 'report.html'}")


@app.command()
def verify(
    statement: Annotated[Path, typer.Argument(help="statement.json")],
    report: Annotated[Path, typer.Argument(help="report.json")],
    model: Annotated[Path, typer.Option(help="the model that it is said to be of")],
    key: Annotated[str, typer.Option(help="the public key of who signed, from somebody whom you trust to know it")],
    weights: WeightsOption = None,
    wheel: WheelOption = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Check that a report was signed, is of this model, and that the chosen cut follows from its figures."""
    choose(format_)

    from caltrain.exposure.open_model import open_subject  # noqa: PLC0415  # torch
    from caltrain.exposure.statement import MAX_REPORT_BYTES, verify_report  # noqa: PLC0415

    signed = envelope_from_json(read_bounded(statement, limit=MAX_ENVELOPE_BYTES), step="read statement")
    raw = read_bounded(report, limit=MAX_REPORT_BYTES)
    subject = open_subject(model, weights=weights, wheel=_wheel(wheel))
    verified = verify_report(signed, raw, model=subject.digest, key=key)
    found = verified.report
    emit(
        {
            "verified": True,
            "signer": verified.signer,
            "model": found.model,
            "report": found.digest(),
            "data": found.data,
            "cuts": sorted(found.cuts),
            "attacks": found.settings.attacks,
            "budget": found.settings.budget,
            "front": verified.front,
            "assumptions": found.assumptions,
        },
        title="The report verifies",
    )


class _Exposure(msgspec.Struct):
    policy: Policy


class _PolicyFile(msgspec.Struct):
    """What a plan, a serving config or a file of its own has to say."""

    exposure: _Exposure | None = None
    policy: Policy | None = None


def _policy(text: str, path: Path | None) -> Policy | None:
    if text and path:
        raise ConfigError(
            "exposure.two-policies", "--policy and --policy-file were given", step="read options", fix="Give one."
        )
    if path is None:
        return parse_policy(text) if text else None
    file = parse_toml(read_bounded(path, limit=MAX_PLAN_BYTES), _PolicyFile, what="policy")
    found = file.exposure.policy if file.exposure else file.policy
    if found is None:
        raise ConfigError(
            "exposure.no-policy",
            f"{path} states no policy",
            step="read policy",
            fix="Give a file with [exposure.policy], as plans have it, or [policy].",
        )
    return check_policy(found)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Numbers with commas; none for `all`."""
    if text.strip() == "all":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) <= 9 for part in parts):
        raise _no_numbers(text, option)
    return tuple(int(part) for part in parts)


def _no_numbers(text: str, option: str) -> ConfigError:
    fix = "Write --cuts 1,4,8 or all; --maps 64 or all."
    return ConfigError("exposure.numbers", f"{option} {text[:60]!r} cannot be read", step="read options", fix=fix)


def _wheel(path: Path | None) -> bytes | None:
    return read_bounded(path, limit=MAX_WHEEL_BYTES) if path else None
