"""Write docs/errors.md from the source: every code, its family, what it says and what to do.

`python scripts/list_errors.py > docs/errors.md`; a test compares the file's codes with the source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from caltrain.errors import FAMILIES

SOURCE = Path(__file__).parents[1] / "src" / "caltrain"
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.[a-z0-9]+(-[a-z0-9]+)*")
# Codes whose first or second half is a parameter, with the values that the calls give.
_PARAMETERS = {"what": ("plan", "policy"), "kind": ("party", "user")}
_APPROVALS = {"what": ("plan", "manifest")}

HEAD = """# Errors

Every error that CalTrain raises on purpose has a stable code, says what failed, at which step, and what to do. The exit
code of a command is that of the error's family; with `--format json` the error is printed as
`{"error": {"family", "code", "what", "step", "fix"}}`, and the host answers with the same object over HTTP.

| family | exit code | |
|---|---|---|
"""


class Entry(NamedTuple):
    """One code as it stands in the source; `what` and `fix` may be empty where a helper makes them."""

    code: str
    family: str
    what: str
    fix: str


def entries() -> list[Entry]:
    """All codes of the package, sorted, the one with most to say of each."""
    best: dict[str, Entry] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for entry in _of_module(ast.parse(path.read_text(encoding="utf-8"))):
            known = best.get(entry.code)
            if known is None or len(entry.what) + len(entry.fix) > len(known.what) + len(known.fix):
                best[entry.code] = entry
    return [best[code] for code in sorted(best)]


def _of_module(tree: ast.Module) -> Iterator[Entry]:
    helpers = _imported(tree) | _functions(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        made = _raised_by(helpers[name]) if name in helpers else None
        family = name if name in FAMILIES else made[0] if made else ""
        if not family or not call.args:
            continue
        fix = _keyword(call, "fix") or (_given(call, helpers[name]) or made[1] if made else "")
        what = _text(call.args[1]) if len(call.args) > 1 else ""
        for code in _codes(call.args[0]):
            yield Entry(code, family, what, fix)


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}


def _imported(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions of other modules of the package, by the names under which this one has them."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.walk(tree):
        path = SOURCE.parent.joinpath(*(node.module or "").split(".")) if isinstance(node, ast.ImportFrom) else SOURCE
        if isinstance(node, ast.ImportFrom) and path.with_suffix(".py").is_file():
            there = _functions(ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")))
            found |= {a.asname or a.name: there[a.name] for a in node.names if a.name in there}
    return found


def _raised_by(function: ast.FunctionDef) -> tuple[str, str] | None:
    """Family and fix of the error that a helper returns."""
    for node in ast.walk(function):
        made = node.value if isinstance(node, ast.Return) else None
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id in FAMILIES:
            return made.func.id, _keyword(made, "fix")
    return None


def _given(call: ast.Call, helper: ast.FunctionDef) -> str:
    """What a call of a helper gives for its parameter `fix` by position, or the parameter's default."""
    names = [argument.arg for argument in helper.args.args]
    if "fix" not in names:
        return ""
    place = names.index("fix")
    if place < len(call.args):
        return _text(call.args[place])
    default = place - len(names) + len(helper.args.defaults)
    return _text(helper.args.defaults[default]) if default >= 0 else ""


def _codes(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)) if _CODE.fullmatch(text):
            yield text
        case ast.IfExp():
            yield from _codes(node.body)
            yield from _codes(node.orelse)
        case ast.JoinedStr(values=[ast.FormattedValue(value=ast.Name(id=name)), ast.Constant(value=str(rest))]):
            made = (value + rest for value in _PARAMETERS.get(name, ()))
            yield from (code for code in made if _CODE.fullmatch(code))
        case ast.JoinedStr(values=[ast.Constant(value=str(start)), ast.FormattedValue(value=ast.Name(id=name))]):
            yield from (start + value for value in _APPROVALS.get(name, ()))
        case _:
            pass


def _keyword(call: ast.Call, name: str) -> str:
    return next((_text(k.value) for k in call.keywords if k.arg == name), "")


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(_text(value) for value in node.values)
        case ast.FormattedValue():
            return "…"
        case ast.IfExp():
            return f"{_text(node.body)} / {_text(node.orelse)}"
        case _:
            return ""


def main() -> None:
    """Print the document."""
    print(HEAD, end="")
    for family in FAMILIES.values():
        print(f"| `{family.__name__}` | {family.exit_code} | {(family.__doc__ or '').strip()} |")
    print("| usage | 2 | The command line is not understood. |\n| interrupted | 130 | Ctrl-C, SIGTERM. |\n")
    print("An … stands for what the error names.\n\n| code | family | says | to do |\n|---|---|---|---|")
    for entry in entries():
        print(f"| `{entry.code}` | {entry.family} | {_cell(entry.what)} | {_cell(entry.fix)} |")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ") or "(the error says)"


if __name__ == "__main__":
    main()
