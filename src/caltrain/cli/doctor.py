"""`caltrain doctor`."""

from __future__ import annotations

import msgspec

from caltrain.cli.output import Format, FormatOption, choose, console, emit, say_simulated, wants_json


def doctor(format_: FormatOption = Format.TEXT) -> None:
    """Say what holds on this machine, and what a simulated enclave does not protect against."""
    from caltrain.attestation.measurement import measure_enclave  # noqa: PLC0415
    from caltrain.doctor import examine  # noqa: PLC0415
    from caltrain.reports.terminal import print_doctor  # noqa: PLC0415

    choose(format_)
    report, measurement = examine(), measure_enclave()
    if wants_json():
        emit({"measurement": measurement} | msgspec.to_builtins(report))
    else:
        print_doctor(report, measurement=measurement, console=console)
        say_simulated()
