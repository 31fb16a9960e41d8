"""The code that a self-contained repository carries: diffusers loads its pipeline where ddpm_hf is not installed."""

import ast
import hashlib
import importlib
import inspect
import json
import re
from pathlib import Path

from ddpm_hf.pipelines.loading import INDEX, OURS
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline

# Names of the files of code in a repository
SHIPPED = ["pipeline.py", "ddpm_hf_*.py", "unet/ddpm_hf_*.py", "scheduler/ddpm_hf_*.py"]
IMPORT = re.compile(r"^( *)from ddpm_hf\.(?:\w+\.)*(\w+) import ", re.MULTILINE)


def code_of(folder: Path) -> dict[str, bytes]:
    """The files of code for the pipeline in `folder`, and its model_index.json that refers to them.

    pipeline.py and every module of ours that it imports, as they are here but for the names by which they import one
    another; and the module of each component's class, once more in the folder of the component. diffusers copies the
    code of all repositories into one folder, so names of modules bear a checksum of the code.
    """
    sources = _sources(DDPMCustomPipeline.__module__)
    checksum = hashlib.sha256("".join(sources[module] for module in sorted(sources)).encode()).hexdigest()[:12]

    def name_of(module: str) -> str:
        return f"ddpm_hf_{checksum}_{module.rpartition('.')[2]}"

    relative = rf"\1from .{name_of('')}\2 import "
    code = {module: IMPORT.sub(relative, source).encode() for module, source in sources.items()}
    files = {"pipeline.py": code.pop(DDPMCustomPipeline.__module__)}
    files |= {f"{name_of(module)}.py": content for module, content in code.items()}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for component in ("unet", "scheduler"):
        if cls := OURS.get(index[component][1]):
            index[component][0] = name_of(cls.__module__)
            files[f"{component}/{name_of(cls.__module__)}.py"] = code[cls.__module__]
    index["_class_name"] = ["pipeline", DDPMCustomPipeline.__name__]
    return files | {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _sources(module: str) -> dict[str, str]:
    """Source of a module and of all modules of ours that it imports, directly or through others, by their names."""
    found, wanted = {}, [module]
    while wanted:
        module = wanted.pop()
        if module not in found:
            found[module] = inspect.getsource(importlib.import_module(module))
            imports = (node for node in ast.walk(ast.parse(found[module])) if isinstance(node, ast.ImportFrom))
            wanted += [node.module for node in imports if (node.module or "").startswith("ddpm_hf.")]
    return found
