"""The measurement: everything that runs inside, nothing else, and nothing that runs inside is left out."""

from __future__ import annotations

import ast
import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

import caltrain
from caltrain.attestation.measurement import DEPENDENCIES, INSIDE, OPTIONAL, measure_enclave
from caltrain.errors import EnvironmentFault
from caltrain.plan import Measurement
from support.samples import refused

PACKAGE = Path(caltrain.__file__).parent
RECORDS = {
    name: f"{name}/core.py,sha256=abc,12\n{name}-1.dist-info/METADATA,sha256=def,3\n{name}-1.dist-info/RECORD,,\n"
    for name in (*DEPENDENCIES, *OPTIONAL)
}


class Wheel:
    """What `metadata.distribution` returns, as far as it is used."""

    def __init__(self, record: str | None) -> None:
        self._record = record

    def read_text(self, name: str) -> str | None:
        return self._record if name == "RECORD" else None


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small program in the place of the installed one, over wheels with one file each."""
    for entry in (*INSIDE, "host", "cli.py"):
        if entry.endswith(".py"):
            (tmp_path / entry).parent.mkdir(exist_ok=True)
            (tmp_path / entry).write_text(f"# {entry}\n")
        else:
            (tmp_path / entry / "deeper").mkdir(parents=True)
            (tmp_path / entry / "a.py").write_text(f"# {entry}/a\n")
            (tmp_path / entry / "deeper" / "b.py").write_text(f"# {entry}/b\n")
            (tmp_path / entry / "notes.txt").write_text("notes")
    monkeypatch.setattr(caltrain, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: Wheel(RECORDS[name]))
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.0")
    return tmp_path


def reference(folder: Path) -> str:
    """The measurement, written out from its description."""
    h = hashlib.sha384(b"caltrain:measurement/v1\x003.11.0")
    for entry in INSIDE:
        names = [entry] if entry.endswith(".py") else [f"{entry}/a.py", f"{entry}/deeper/b.py"]
        for name in names:
            h.update(name.encode() + b"\0" + hashlib.sha384((folder / name).read_bytes()).digest())
    for name in (*DEPENDENCIES, *OPTIONAL):
        h.update(name.encode() + b"\0" + hashlib.sha384(f"{name}/core.py,sha256=abc,12".encode()).digest())
    return "sha384:" + h.hexdigest()


def test_the_measurement_is_files_python_and_wheels(program: Path) -> None:
    assert measure_enclave() == reference(program)


def write(name: str, text: str = "changed = True\n") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a changed module": write("enclave/a.py"),
    "a changed module in a deeper folder": write("records/deeper/b.py"),
    "a changed file at the top": write("plan.py"),
    "an added module": write("crypto/extra.py"),
    "an added empty module": write("crypto/extra.py", ""),
    "a removed module": lambda folder: (folder / "boundary" / "a.py").unlink(),
    "a renamed module": lambda folder: (folder / "boundary" / "a.py").rename(folder / "boundary" / "c.py"),
    "a moved module": lambda folder: (folder / "boundary" / "a.py").rename(folder / "boundary" / "deeper" / "a.py"),
    "two modules swapped": lambda folder: [
        write("models/a.py", "# models/b\n")(folder),
        write("models/deeper/b.py")(folder),
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_program_has_another_measurement(program: Path, change: Callable[[Path], object]) -> None:
    before = measure_enclave()
    change(program)
    assert measure_enclave() != before


@pytest.mark.parametrize("name", ["host/a.py", "cli.py", "enclave/notes.txt", "enclave/a.pyc"])
def test_what_does_not_run_inside_does_not_count(program: Path, name: str) -> None:
    before = measure_enclave()
    write(name)(program)
    assert measure_enclave() == before


def test_a_module_that_is_gone_is_not_measured_as_nothing(program: Path) -> None:
    shutil.rmtree(program / "enclave")
    with pytest.raises(FileNotFoundError):
        measure_enclave()


@pytest.mark.parametrize("name", [*DEPENDENCIES, *OPTIONAL])
def test_another_build_of_a_dependency_has_another_measurement(
    program: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = measure_enclave()
    monkeypatch.setitem(RECORDS, name, RECORDS[name].replace("abc", "abd"))
    assert measure_enclave() != before == reference(program)


def test_installer_notes_and_order_of_files_do_not_count(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDS, "numpy", "b.py,sha256=1,1\na.py,sha256=2,1\n")
    before = measure_enclave()
    more = "a.py,sha256=2,1\nnumpy-1.dist-info/INSTALLER,sha256=9,4\n__pycache__/a.pyc,,\nb.py,sha256=1,1\n"
    monkeypatch.setitem(RECORDS, "numpy", more)
    assert measure_enclave() == before != reference(program)


def test_another_python_has_another_measurement(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.1")
    assert measure_enclave() != reference(program)


def missing(name: str) -> Wheel:
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("distribution", [missing, lambda _: Wheel(None)], ids=["not installed", "no record"])
def test_a_dependency_that_cannot_be_measured_is_refused(
    program: Path, monkeypatch: pytest.MonkeyPatch, distribution: Callable[[str], Wheel]
) -> None:
    del program
    monkeypatch.setattr(metadata, "distribution", distribution)
    with refused(EnvironmentFault, "measurement.no-record"):
        measure_enclave()


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_extra_that_is_absent_has_a_measurement_of_its_own(
    program: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = measure_enclave()
    monkeypatch.setattr(metadata, "distribution", lambda n: missing(n) if n == name else Wheel(RECORDS[n]))
    assert measure_enclave() != before == reference(program)


def test_the_installed_program_has_one_measurement() -> None:
    assert measure_enclave() == msgspec.convert(measure_enclave(), Measurement)


# -- the installed program: nothing runs inside that is not measured ---------------------------------------------------


def inside_files() -> list[Path]:
    found = [PACKAGE / entry for entry in INSIDE]
    return sorted(file for path in found for file in (path.rglob("*.py") if path.is_dir() else [path]))


def imports(file: Path) -> Iterator[str]:
    """What a file imports when it runs: not what it names for type checkers only."""
    tree = ast.parse(file.read_bytes())
    for_types = {inner for node in ast.walk(tree) if is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield f"{node.module}"
            if node.module == "caltrain":
                yield from (f"caltrain.{alias.name}" for alias in node.names)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def above(name: str) -> set[str]:
    """The packages that a module is in, but for the outermost."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(2, len(parts))}


def test_no_attack_is_measured_since_none_runs_inside() -> None:
    assert not [file for file in inside_files() if "attacks" in file.parts]


@pytest.mark.parametrize("file", inside_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_measured_file_imports_no_unmeasured_one(file: Path) -> None:
    measured = {f"caltrain.{entry.removesuffix('.py').replace('/', '.')}" for entry in INSIDE}
    ours = {name for name in imports(file) if name.startswith("caltrain.")}
    assert not {name for name in ours if not {name, *above(name)} & measured}


def reached(start: Path) -> set[Path]:
    """All our files that an import of `start` runs, its own and those of the packages around them."""
    found, due = set[Path](), [start]
    while due:
        file = due.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        ours = {name for name in imports(file) if name.startswith("caltrain.")}
        for name in ours.union(*map(above, ours)):
            path = PACKAGE.joinpath(*name.split(".")[1:])
            due += [path.with_suffix(".py"), path / "__init__.py"]
    return found


def test_all_that_the_enclave_program_imports_is_measured_in_both_of_its_roles() -> None:
    program = reached(PACKAGE / "enclave" / "__main__.py")
    names = {file.relative_to(PACKAGE).as_posix() for file in program}
    assert names >= {
        *("enclave/session.py", "enclave/serve.py", "enclave/infer.py", "boundary/serving.py"),
        *(f"serving/{name}.py" for name in ("__init__", "package", "precision", "session")),
    }
    assert program <= set(inside_files())
    of_serving = {name for name in names if name.startswith("serving/")}
    assert of_serving == {entry for entry in INSIDE if entry.startswith("serving/")}  # and no more than it needs
