"""The dependency rule of docs/architecture.md, read off the imports; and what an import may load."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "anchorscope"

# A package may import itself, those listed, and the plain modules at the root of `anchorscope`.
MAY_IMPORT = {
    "dumps": set(),
    "plots": set(),
    "report": set(),
    "models": set(),
    "capture": {"dumps", "models", "runs"},
    "runs": {"dumps"},
    "analysis": {"kernels", "plots", "runs", "heads"},
    "methods": {"kernels"},
    "compare": {"methods", "plots", "runs"},
    "heads": {"dumps", "kernels", "methods", "plots", "runs"},
    "bench": {"dumps", "kernels", "plots", "runs"},
    "calibration": {"dumps", "analysis", "plots", "runs"},
    "merging": {"analysis", "calibration", "compare", "heads", "runs"},
    "runtime": {"models", "kernels"},
    "evaluation": {"models", "runtime", "plots", "runs"},
    "cli": {
        "dumps",
        "runs",
        "models",
        "capture",
        "analysis",
        "bench",
        "report",
        "methods",
        "compare",
        "heads",
        "calibration",
        "evaluation",
        "merging",
    },
}
HEAVY = {"torch", "transformers", "matplotlib", "triton", "numpy", "safetensors"}


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Absolute names of the modules a file imports, type-checking blocks left out."""
    found: set[str] = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module == "anchorscope":
                found.update(f"anchorscope.{alias.name}" for alias in node.names)  # a package, or a lazy name
            elif isinstance(node, ast.ImportFrom):
                found.add("." * node.level + (node.module or ""))
            elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
                visit(ast.iter_child_nodes(node))
            if not top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(node.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


@pytest.mark.parametrize("folder", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()))
def test_one_direction(folder):
    assert folder in MAY_IMPORT, f"say in docs/architecture.md and here what anchorscope/{folder} may import"
    allowed = MAY_IMPORT[folder] | {folder}
    packages = set(MAY_IMPORT) | {"kernels"}
    for path in (PACKAGE / folder).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("anchorscope.")}
        assert used & packages <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used & packages - allowed)}"


def test_no_permission_is_stale():
    packages = set(MAY_IMPORT) | {"kernels"}
    for folder, allowed in MAY_IMPORT.items():
        used = {
            name.split(".")[1]
            for path in (PACKAGE / folder).rglob("*.py")
            for name in imports(path)
            if name.startswith("anchorscope.")
        }
        assert not allowed - used & packages, f"{folder} no longer imports {sorted(allowed - used)}"


def test_kernels_stand_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        names = imports(path)
        assert not {n for n in names if n.split(".")[0] in {"anchorscope", "transformers", "matplotlib"}}, path.name


def test_who_knows_transformers_and_who_no_torch():
    for path in PACKAGE.rglob("*.py"):
        roots = {n.split(".")[0] for n in imports(path)}
        folder = path.relative_to(PACKAGE).parts[0]
        if folder != "models":
            assert "transformers" not in roots, path
        if folder in (
            "plots",
            "report",
            "tokens.py",
            "profiles.py",
            "params.py",
            "parse.py",
            "errors.py",
            "anchors.py",
            "proof.py",
        ):
            assert "torch" not in roots, path


def test_cli_files_import_nothing_heavy():
    for path in (PACKAGE / "cli").glob("*.py"):
        roots = {n.split(".")[0] for n in imports(path, top_only=True)}
        assert not roots & HEAVY, path.name


def test_help_loads_nothing_heavy():
    """The help of every command, the version and `import anchorscope` are instant because nothing heavy is imported."""
    code = (
        "import sys, anchorscope; from anchorscope.cli.app import app, main; main(['--version']); main(['--help']);"
        "[main([c.callback.__name__, '--help']) for c in app.registered_commands];"
        f"print('LOADED', sorted(set(sys.modules) & {HEAVY!r}), len(app.registered_commands))"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    ).stdout
    loaded = out.rstrip().splitlines()[-1].split()
    assert loaded[:2] == ["LOADED", "[]"]
    assert out.count("Usage: ") == 1 + int(loaded[2]) >= 11


def test_package_list_equals_the_disk():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py") if "__pycache__" not in p.parts
    } | {"anchorscope.kernels"}
    assert listed == on_disk


def test_lazy_names_resolve():
    import anchorscope

    assert set(anchorscope.__all__) == {"__version__", *anchorscope._HOME_OF}
    for name in anchorscope.__all__:
        assert getattr(anchorscope, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = anchorscope.nonsense


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("anchorscope.report", "draw_all", "anchorscope.plots.draw.draw_all"),
        ("anchorscope.dumps.writer", "write_dump", "anchorscope.dumps.arrays.write_dump"),
        ("anchorscope.report.tokens", "token_texts", "anchorscope.tokens.token_texts"),
        ("anchorscope.kernels.profile", "dense_lse", "anchorscope.kernels.dense_lse.dense_lse"),
        ("anchorscope.selection", "parse_thetas", "anchorscope.parse.parse_thetas"),
        ("anchorscope.heads", "Stripes", "anchorscope.heads.stripes.HeadStripes"),
        ("anchorscope.heads.stripes", "Stripes", "anchorscope.heads.stripes.HeadStripes"),
        ("anchorscope.analysis.engine", "HeadResult", "anchorscope.profiles.Measured"),
        ("anchorscope.calibration.curves", "Head", "anchorscope.calibration.curves.HeadIndex"),
        ("anchorscope.bench.run", "Row", "anchorscope.bench.rows.Row"),
        ("anchorscope.bench.run", "DTYPES", "anchorscope.bench.request.DTYPES"),
    ],
)
def test_names_that_moved_still_work(module, name, home):
    old = importlib.import_module(module)
    home, new_name = home.rsplit(".", 1)
    with pytest.warns(DeprecationWarning, match=home):
        assert getattr(old, name) is getattr(importlib.import_module(home), new_name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = old.nonsense


@pytest.mark.parametrize(
    ("old", "name", "home"),
    [
        ("weights", "check_report", "anchorscope.models.weights"),
        ("weights", "model_device", "anchorscope.models.placement"),
        ("models", "load_model", "anchorscope.models.load"),
        ("models", "model_facts", "anchorscope.models.facts"),
        ("chunking", "Prefill", "anchorscope.models.prefill"),
        ("sources", "locate", "anchorscope.models.locate"),
    ],
)
def test_modules_that_moved_still_work(old, name, home):
    module = importlib.import_module(f"anchorscope.capture.{old}")
    with pytest.warns(DeprecationWarning, match=home) as warned:
        found = getattr(module, name)
    assert warned[0].filename == __file__
    assert found is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = module.nonsense


def test_modules_that_moved_are_imported_every_way():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import anchorscope.capture.hook, anchorscope.capture.weights as weights\n"
        "from anchorscope.capture.check import check_call\n"
        "from anchorscope.capture import proof\n"
        "assert anchorscope.capture.hook.intercept is anchorscope.capture.intercept\n"
        "assert weights.listed and proof.score and check_call\n"
        "warnings.simplefilter('error')\n"
        "try:\n    from anchorscope.capture.hook import divert\n"
        "except DeprecationWarning as warning:\n    print(warning)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.startswith("anchorscope.capture.hook.divert moved to anchorscope.models.hook")


def test_places_that_the_documentation_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Where do I change") : text.index("## The rooms in words")]
    named = re.findall(r"`((?:anchorscope|kernels|tests|docs)/[\w./]*)`", table)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


def _body(function: ast.FunctionDef) -> list[ast.stmt]:
    """Its statements without the docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def test_modules_and_functions_stay_small():
    """At most 400 lines, 60 lines and 8 parameters; kernels, ops and the signatures of commands may be longer."""
    long = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if text.count("\n") > 400:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for f in [f for f in ast.walk(ast.parse(text)) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]:
            if any("jit" in ast.dump(x) for x in f.decorator_list):
                continue
            command = path.parent == PACKAGE / "cli" and not f.name.startswith("_")
            start = _body(f)[0].lineno if command and _body(f) else f.lineno
            if f.end_lineno - start + 1 > 60:
                long.append(f"{name}: {f.name} has {f.end_lineno - start + 1} lines")
            count = len([a for a in f.args.args if a.arg not in ("self", "cls")]) + len(f.args.kwonlyargs)
            op = f.name == "anchor_attention" or any("_op" in ast.dump(x) for x in f.decorator_list)
            if count > 8 and not command and not op:
                long.append(f"{name}: {f.name} has {count} parameters")
    assert not long
