"""The measurement of the enclave program: what runs inside, in one digest.

It covers the Python files that the enclave may import (its own folder and the vocabulary), the version of Python, and
for each dependency the hashes that its installed wheel records. The model is not in it: it is data, under the plan. A
wheel of a user's stages is code: `with_wheel`.
Neither are compiled caches (`__pycache__`), which Python trusts by date: an image for a TEE must not have any.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import caltrain
from caltrain.errors import EnvironmentFault

# Of this room the measures and policies alone: attacks never run inside.
_OF_EXPOSURE = (
    *("__init__", "choice", "correlation", "figures", "inside", "kl", "maps"),
    *("material", "policy", "precision", "shown", "statistics", "subject", "validator"),
)
INSIDE = (
    "__init__.py",
    "errors.py",
    "plan.py",
    "crypto",
    "records",
    "attestation",
    "models",
    "training",
    "accountability",
    "provenance",
    "boundary",
    "enclave",
    *(f"exposure/{name}.py" for name in _OF_EXPOSURE),
    *(f"serving/{name}.py" for name in ("__init__", "package", "precision", "session")),
)
OPTIONAL = ("pyseccomp",)
DEPENDENCIES = ("cryptography", "msgspec", "numpy", "rfc8785", "safetensors", "scipy", "torch")


def measure_enclave() -> str:
    """`sha384:` digest of the installed enclave program. Raises EnvironmentFault where a dependency is missing."""
    h = hashlib.sha384(b"caltrain:measurement/v1\0" + platform.python_version().encode())
    root = Path(caltrain.__file__).parent
    for entry in INSIDE:
        path = root / entry
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            h.update(f"{file.relative_to(root).as_posix()}\0".encode() + hashlib.sha384(file.read_bytes()).digest())
    for name in DEPENDENCIES:
        h.update(f"{name}\0".encode() + _wheel_digest(name))
    for name in OPTIONAL:
        h.update(f"{name}\0".encode() + (_wheel_digest(name) if _is_installed(name) else b"absent"))
    return "sha384:" + h.hexdigest()


def with_wheel(measurement: str, sha256: str) -> str:
    """The measurement of that program with a wheel of stages in it, by the wheel's plain `sha256:` digest.

    Its code runs inside, in the same process, so it is part of the program: an enclave that was started with another
    wheel, or with one at all, does not pass for this one.
    """
    raw = b"caltrain:measurement-with-wheel/v1\0" + f"{measurement}\0{sha256}".encode()
    return "sha384:" + hashlib.sha384(raw).hexdigest()


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _wheel_digest(name: str) -> bytes:
    try:
        record = metadata.distribution(name).read_text("RECORD")
    except metadata.PackageNotFoundError:
        record = None
    if record is None:
        raise EnvironmentFault(
            "measurement.no-record",
            f"the dependency {name} is not installed from a wheel",
            step="measure enclave",
            fix=f"Install it with pip: pip install {name}",
        )
    # Files without a hash (the record itself, compiled caches) and installer notes differ between machines.
    lines = [line for line in record.splitlines() if ",sha256=" in line and ".dist-info/" not in line]
    return hashlib.sha384("\n".join(sorted(lines)).encode()).digest()
