"""Break one check at a time, and see that a test notices.

    python scripts/break_checks.py src/caltrain/crypto src/caltrain/plan.py --jobs 2

A check is an `if` that ends in `raise`, or a `raise` at the end of a function that others return from before. Each one
is disabled in turn: the condition becomes `False`; one operand of an `or`, an `and` or a chained comparison in it is
dropped; the last `raise` becomes `pass`. (`except X: raise Y` is a translation, not a check.) The changed file goes
into a temporary copy of `src/` that comes first on PYTHONPATH, so the working tree is never touched, and the tests run
on it: those given with `--tests`, otherwise the module's own test file first, then `tests/unit/<its package>`.

A check that no test notices is printed with file and line, and the exit status is 1; 2 where the tests fail with all
checks in place. Where no input can show the difference, `# equivalent: <reason>` skips what starts on its line: the
whole check on the line of the `if`, one operand on a line of its own.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "caltrain"
_SKIP = re.compile(rb"#\s*equivalent:\s*\S")
_PASSED, _FAILED, _STOPPED = 0, 1, 2  # pytest's exit codes; a failure while collecting stops it


@dataclass(frozen=True)
class Change:
    """`file` with one check disabled: `what` is changed on `line`, and `source` is the result."""

    file: Path
    line: int
    what: str
    source: bytes

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.what}"


def find_changes(file: Path) -> list[Change]:
    """All ways to disable a check of `file`, by line."""
    source = file.read_bytes()
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))

    def change(node: ast.expr | ast.stmt, line: int, text: str, what: str) -> Change:
        start = offsets[node.lineno - 1] + node.col_offset
        end = offsets[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        return Change(file, line, what, source[:start] + text.encode() + source[end:])

    found = [change(*broken) for node in ast.walk(ast.parse(source)) for broken in _breaks(node)]
    return sorted((c for c in found if not _SKIP.search(lines[c.line - 1])), key=lambda c: (c.line, c.what))


def _breaks(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, int, str, str]]:
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        yield node.test, node.lineno, "False", f"never: {ast.unparse(node.test)}"
        for part in ast.walk(node.test):
            yield from _weaker(part)
    if isinstance(node, ast.FunctionDef) and any(isinstance(part, ast.Return) for part in ast.walk(node)):
        last = node.body[-1]
        if isinstance(last, ast.Raise):
            yield last, last.lineno, "pass", f"no raise at the end of {node.name}"


def _weaker(part: ast.AST) -> Iterator[tuple[ast.expr, int, str, str]]:
    terms: Sequence[ast.expr]
    if isinstance(part, ast.BoolOp):
        word, terms = " or " if isinstance(part.op, ast.Or) else " and ", part.values
    elif isinstance(part, ast.Compare) and len(part.ops) > 1:
        word, values = " and ", [part.left, *part.comparators]
        links = zip(values, part.ops, values[1:], strict=False)
        terms = [ast.copy_location(ast.Compare(left, [op], [right]), right) for left, op, right in links]
    else:
        return
    for dropped, term in enumerate(terms):
        rest = word.join(f"({ast.unparse(other)})" for i, other in enumerate(terms) if i != dropped)
        yield part, term.lineno, f"({rest})", f"without: {ast.unparse(term)}"


def default_tests(file: Path) -> list[list[str]]:
    """Groups of test paths for a file of the package, narrowest first."""
    folder = ROOT / "tests" / "unit"
    parts = file.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return [[str(folder / f"test_{file.stem}.py")]]
    own = [str(path) for path in sorted((folder / parts[0]).glob(f"test_*{file.stem}.py"))]
    return [group for group in (own, [str(folder / parts[0])]) if group]


def run_tests(tests: Sequence[str], *, timeout: float, changed: Change | None = None) -> tuple[int, str]:
    """Exit code and output of pytest on a copy of `src/` with one change; a run past `timeout` has failed."""
    with tempfile.TemporaryDirectory(prefix="break-checks-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        if changed is not None:
            target = source / changed.file.relative_to(ROOT / "src")
            target.write_bytes(changed.source)
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(folder) / "hypothesis"),
        }
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={folder}/pytest"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        with subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests started
                process.communicate()
                return _FAILED, "timed out"
        return process.returncode, output.decode(errors="replace")


def survives(change: Change, *, groups: list[list[str]] | None, timeout: float) -> bool:
    """Whether all tests pass with the check disabled. Raises RuntimeError where pytest could not run them."""
    for tests in groups or default_tests(change.file):
        code, output = run_tests(tests, timeout=timeout, changed=change)
        if code in {_FAILED, _STOPPED}:
            return False
        if code != _PASSED:
            raise RuntimeError(f"{change}: pytest exited with {code}\n{output[-2000:]}")
    return True


def _files(paths: Sequence[Path]) -> list[Path]:
    found = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    return sorted(file.resolve() for file in found)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PACKAGE_OR_FILE")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="tests that should notice")
    parser.add_argument("--list", action="store_true", help="print the checks and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for one run of the tests")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all noticed, 1 some survive, 2 the tests fail by themselves."""
    options = _arguments(argv)
    changes = [change for file in _files(options.paths) for change in find_changes(file)]
    if options.list:
        print(*changes, sep="\n")
        return 0
    groups = [options.tests] if options.tests else None
    wanted = sorted({tuple(tests) for change in changes for tests in groups or default_tests(change.file)})
    for tests in wanted:
        code, output = run_tests(tests, timeout=options.timeout)
        if code != _PASSED:
            print(output, f"with all checks in place, pytest exits with {code} on {' '.join(tests)}", sep="\n")
            return 2
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        check = partial(survives, groups=groups, timeout=options.timeout)
        for change, survived in zip(changes, pool.map(check, changes), strict=True):
            if survived:
                survivors += 1
                print(change, flush=True)
    print(f"{len(changes) - survivors} of {len(changes)} broken checks were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
