"""`caltrain doctor`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from caltrain.cli.output import Format, FormatOption, choose, console, emit, say_simulated, wants_json
from caltrain.files import read_bounded
from caltrain.models.spec import MAX_WHEEL_BYTES


def doctor(
    wheel: Annotated[Path | None, typer.Option(help="print the measurement with this wheel of stages in it")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Say what holds on this machine, and what a simulated enclave does not protect against."""
    from caltrain.attestation.measurement import measure_enclave, with_wheel  # noqa: PLC0415
    from caltrain.crypto.digests import to_text  # noqa: PLC0415
    from caltrain.doctor import examine  # noqa: PLC0415
    from caltrain.reports.terminal import print_doctor  # noqa: PLC0415

    choose(format_)
    report, measurement = examine(), measure_enclave()
    if wheel is not None:
        raw = read_bounded(wheel, limit=MAX_WHEEL_BYTES)
        measurement = with_wheel(measurement, to_text(hashlib.sha256(raw).digest()))
    if wants_json():
        emit({"measurement": measurement} | msgspec.to_builtins(report))
    else:
        print_doctor(report, measurement=measurement, console=console)
        say_simulated()
