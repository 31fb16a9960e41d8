"""What is true of the repository and of the wheel that is built from it."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import torch

import ddpm_hf
from ddpm_hf.config import recipe_names, resolve

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "ddpm_hf").glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ddpm_hf"):
            found |= {node.module} if "." in node.module else {f"ddpm_hf.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ddpm_hf")}
    return {name.removeprefix("ddpm_hf.") for name in found}


def test_imports_go_one_way():
    imports = {path.stem: imports_of(path) for path in MODULES}
    assert imports["unet"] == imports["scheduler"] == set()  # each can be shipped as one file
    assert [name for name, used in imports.items() if "cli" in used] == ["__main__"]
    assert not imports["training"] & {"hub", "pictures", "legibility", "evaluation", "cli"}


def test_using_a_model_needs_the_base_dependencies_only():
    """What `import ddpm_hf` imports; training, pictures and evaluation may ask for more."""
    for name in ("__init__", "unet", "scheduler", "pipeline"):
        tree = ast.parse((ROOT / "ddpm_hf" / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        third_party = {module.split(".")[0] for module in imported} - sys.stdlib_module_names
        assert third_party <= {"ddpm_hf", "torch", "diffusers", "numpy", "PIL"}, name


def test_constraints_pin_all_that_the_project_asks_for():
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[A-Za-z0-9_-]+", line)[0] for line in wanted} - {"ddpm-hf"}
    assert names <= pins.keys()


def test_the_readme_shows_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for name in recipe_names():
        config = resolve({"config": name})
        with torch.device("meta"):
            channels = 1 if name == "digits" or name.endswith("mnist") else 3
            unet = ddpm_hf.DDPMUNet(in_channels=channels, **config.unet)
        millions = sum(p.numel() for p in unet.parameters()) / 1e6
        (told,) = re.findall(rf"^\| `{name}`.* ([\d.]+) M", readme, re.M)
        assert told == f"{millions:.{len(told.split('.')[1])}f}", name
    for path in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / path).exists(), path
    assert ddpm_hf.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {ddpm_hf.__version__}" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_the_wheel_installed_elsewhere_has_all_it_needs(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {p for p in (ROOT / "ddpm_hf").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {str(p.relative_to(ROOT)) for p in shipped} <= names
    assert {"ddpm_hf/py.typed", "ddpm_hf/recipes/digits.yaml", "ddpm_hf/templates/model_card.md"} <= names

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # the dependencies of this environment, without its own editable installation of the project
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = tmp_path / "venv/bin/ddpm-hf"
    done = subprocess.run([command, "--version"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"ddpm-hf {ddpm_hf.__version__}\n"
    code = "import ddpm_hf, ddpm_hf.config as c; print(ddpm_hf.__file__); print(*c.recipe_names())"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert str(site) in done.stdout
    assert done.stdout.split()[1:] == sorted(path.stem for path in (ROOT / "ddpm_hf/recipes").glob("*.yaml"))
