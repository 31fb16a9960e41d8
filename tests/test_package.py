"""What is true of the repository and of the wheel that is built from it."""

import ast
import importlib
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
from conftest import tiny_unet
from packaging.requirements import Requirement
from packaging.version import Version

import ddpm_hf
from ddpm_hf.training.config import recipe_names, resolve

ROOT = Path(__file__).parent.parent
IMPORT_ORDERS = {
    "ours first": "import ddpm_hf; from diffusers import DiffusionPipeline",
    "ours last": "from diffusers import DiffusionPipeline; import ddpm_hf",
    "ours between": "import diffusers; import ddpm_hf; from diffusers import DiffusionPipeline",
    "our network first": "from ddpm_hf import DDPMUNet; from diffusers import DiffusionPipeline",
}


def python(*args: str, **options) -> str:
    """What a process of Python prints."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import ddpm_hf",
        "import ddpm_hf.commands.main as m, contextlib as c\nwith c.suppress(SystemExit): m.main(['--version'])",
        "import ddpm_hf.commands.main as m, contextlib as c\nwith c.suppress(SystemExit): m.main(['--help'])",
    ],
)
def test_what_needs_no_torch_does_not_import_it(code):
    """Importing torch takes seconds of CPU time; modules are easier to count than seconds."""
    imported = python("-c", f"{code}\nimport sys; print(*sys.modules)").splitlines()[-1].split()
    assert "ddpm_hf" in imported
    assert not {"torch", "diffusers", "numpy", "transformers", "PIL"} & set(imported)
    assert len(imported) < 500


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny_pipeline")
    ddpm_hf.DDPMCustomPipeline(tiny_unet(), ddpm_hf.LinearNoiseScheduler()).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "order", ["ours first", *(pytest.param(k, marks=pytest.mark.slow) for k in list(IMPORT_ORDERS)[1:])]
)
def test_diffusers_finds_our_classes_whoever_is_imported_first(tiny_pipeline, order):
    code = f"{IMPORT_ORDERS[order]}\nimport sys, diffusers, ddpm_hf\n"
    code += f"pipeline = DiffusionPipeline.from_pretrained({str(tiny_pipeline)!r})\n"
    code += "print(type(pipeline).__module__, type(pipeline.unet).__name__, type(pipeline.scheduler).__name__)\n"
    code += "print(diffusers.DDPMUNet is ddpm_hf.DDPMUNet, hasattr(diffusers, 'DDPMNothing'))\n"
    code += "print([finder for finder in sys.meta_path if 'AfterImport' in repr(finder)])"
    printed = python("-W", "error::DeprecationWarning:ddpm_hf", "-c", code).splitlines()[-3:]
    assert printed == ["ddpm_hf.pipelines.pipeline DDPMUNet LinearNoiseScheduler", "True False", "[]"]


def test_public_names():
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name)
        assert name in dir(ddpm_hf)
    with pytest.raises(AttributeError, match="module 'ddpm_hf' has no attribute 'DDPMNothing'"):
        _ = ddpm_hf.DDPMNothing


@pytest.mark.parametrize(
    ("former", "name"),
    {
        "cli": "commands.main",
        "config": "training.config",
        "demo": "commands.demo_page",
        "films": "utils.pictures",
        "pipeline": "pipelines.pipeline",
        "scheduler": "schedulers.noise",
        "solvers": "schedulers.solvers",
        "unet": "models.unet",
    }.items(),
)
def test_a_moved_module_is_found_under_its_former_name(monkeypatch, former, name):
    monkeypatch.delitem(sys.modules, f"ddpm_hf.{former}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"ddpm_hf\.{former} is deprecated .*; use ddpm_hf\.{name}$"):
        module = importlib.import_module(f"ddpm_hf.{former}")
    assert module is importlib.import_module(f"ddpm_hf.{name}")
    assert module.__name__ == module.__spec__.name == f"ddpm_hf.{name}"


def test_names_that_the_readme_has_shown():
    code = "from ddpm_hf import SOLVERS, Film, TrainConfig, train\nfrom ddpm_hf.training import train as again\n"
    code += "from ddpm_hf.films import Film as former\nfrom ddpm_hf import solvers\n"
    assert (
        python("-c", f"{code}print(train is again, former is Film, solvers.SOLVERS is SOLVERS)") == "True True True\n"
    )


BASE = {"ddpm_hf", "torch", "diffusers", "huggingface_hub", "safetensors", "numpy", "PIL"}


def test_using_a_model_needs_the_base_dependencies_only():
    """What `import ddpm_hf` imports; training, pictures and evaluation may ask for more."""
    rooms = [*(ROOT / "ddpm_hf" / room for room in ("models", "schedulers", "pipelines"))]
    for path in (ROOT / "ddpm_hf/__init__.py", *(path for room in rooms for path in sorted(room.glob("*.py")))):
        tree = ast.parse(path.read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        third_party = {module.split(".")[0] for module in imported} - sys.stdlib_module_names
        assert third_party <= BASE, path


def test_constraints_pin_all_that_the_project_asks_for():
    newest, lowest = (
        {
            name.lower().replace("_", "-"): Version(version)
            for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)
        }
        for text in ((ROOT / name).read_text() for name in ("constraints.txt", "constraints-lowest.txt"))
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, [*project["dependencies"], *chain(*project["optional-dependencies"].values())])
    wanted = {line.name: line.specifier for line in wanted if line.name != "ddpm-hf"}
    assert wanted.keys() <= newest.keys()
    assert wanted.keys() == lowest.keys()
    for name, bounds in wanted.items():
        assert newest[name] in bounds
        assert any(bound.operator == ">=" and Version(bound.version) == lowest[name] for bound in bounds), name


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
    assert {"ddpm_hf/py.typed", "ddpm_hf/recipes/digits.yaml", "ddpm_hf/hub/model_card.md"} <= names

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
    code = "import ddpm_hf, ddpm_hf.training.config as c; print(ddpm_hf.__file__); print(*c.recipe_names())"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert str(site) in done.stdout
    assert done.stdout.split()[1:] == sorted(path.stem for path in (ROOT / "ddpm_hf/recipes").glob("*.yaml"))
