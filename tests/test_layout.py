"""The layers of the package: imports go downward only."""

from __future__ import annotations

import ast
import pathlib

import pytest

import lrp_fast

ROOT = pathlib.Path(lrp_fast.__file__).parent
LEVELS = (
    ("kernels",),
    ("version", "environment", "memory", "layers", "rules", "plan", "splits", "scopes", "watch"),
    ("composites", "reference", "backends"),
    ("trace", "engine"),
    ("attribution", "audit", "runners", "starts", "explain", "heatmap", "images", "models", "embedded", "data", "store", "metrics"),
    ("methods",),
    ("__init__",),
    ("report", "batches", "pipeline", "export", "integrations"),
    ("devices", "cluster", "evaluation"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in ROOT.rglob("*.py") if "kernels" not in path.parts)
TRITON = ROOT / "backends" / "triton"
OPTIONAL = (
    "triton", "torchvision", "timm", "matplotlib", "zennit", "captum", "pytorch_grad_cam", "quantus", "zarr", "pyarrow",
    "h5py", "yaml", "ray",
)  # fmt: skip


def _unit(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def _imports(path: pathlib.Path) -> list[tuple[str, bool]]:
    """Every module imported, and whether the import is at the top level (loaded with the module)."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: pathlib.Path) -> None:
    own = _unit(path)
    for name, _ in _imports(path):
        if name.split(".")[0] != "lrp_fast":
            continue
        parts = name.split(".")
        unit = parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__"
        assert unit == own or LEVEL[unit] <= LEVEL[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_imported_where_used(path: pathlib.Path) -> None:
    at_top = {name.split(".")[0] for name, top in _imports(path) if top}
    assert not at_top & set(OPTIONAL) - ({"triton"} if TRITON in path.parents else set())


def test_the_triton_backend_is_imported_where_used() -> None:
    outside = [path for path in MODULES if TRITON not in path.parents]
    assert not [
        path for path in outside for name, top in _imports(path) if top and name.startswith("lrp_fast.backends.triton")
    ]


def test_reference_shares_nothing_with_the_backends() -> None:
    imported = [name for name, _ in _imports(ROOT / "reference.py")]
    assert not [
        name for name in imported if name.startswith(("lrp_fast.backends", "lrp_fast.engine", "lrp_fast.splits"))
    ]


def test_only_the_triton_backend_imports_kernels() -> None:
    importers = [path for path in MODULES if any(name.startswith("lrp_fast.kernels") for name, _ in _imports(path))]
    assert importers
    assert all(TRITON in path.parents for path in importers)


def test_kernels_import_nothing_of_the_package() -> None:
    kernels = sorted((ROOT / "kernels").glob("*.py"))
    assert kernels
    assert not [path for path in kernels if any(name.startswith("lrp_fast") for name, _ in _imports(path))]


def test_kernels_are_reached_through_the_package() -> None:
    import lrp_fast.kernels

    assert (ROOT / "kernels").resolve() == pathlib.Path(lrp_fast.kernels.__file__).resolve().parent
