"""The code of a self-contained repository, whose pipeline diffusers loads without this package."""

import ast
import hashlib
import importlib
import inspect
import json
import re
from pathlib import Path

from ddpm_hf.pipelines.loading import INDEX, OURS
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.utils.arguments import read_json

# Names of the code files in a repository
SHIPPED = ["pipeline.py", "ddpm_hf_*.py", "unet/ddpm_hf_*.py", "scheduler/ddpm_hf_*.py"]
IMPORT = re.compile(r"^( *)from ddpm_hf\.(?:\w+\.)*(\w+) import ", re.MULTILINE)


def code_of(folder: Path) -> dict[str, bytes]:
    """The code files for the pipeline in `folder`, and its model_index.json with references to them.

    The files are pipeline.py, every module of this package that it imports, and one file for each of the two components
    in its folder, with all that it needs, because diffusers downloads no other. Only the imports between the modules
    differ from the installed code. File names contain a checksum of the code, because diffusers copies the code of all
    repositories into one folder.
    """
    sources = _sources(DDPMCustomPipeline.__module__)
    checksum = hashlib.sha256("".join(sources[module] for module in sorted(sources)).encode()).hexdigest()[:12]

    def name_of(module: str) -> str:
        return f"ddpm_hf_{checksum}_{module.rpartition('.')[2]}"

    relative = rf"\1from .{name_of('')}\2 import "
    code = {module: IMPORT.sub(relative, source).encode() for module, source in sources.items()}
    files = {"pipeline.py": code.pop(DDPMCustomPipeline.__module__)}
    files |= {f"{name_of(module)}.py": content for module, content in code.items()}
    index = read_json(folder / INDEX)
    for component in ("unet", "scheduler"):
        if cls := OURS.get(index[component][1]):
            index[component][0] = name_of(cls.__module__)
            files[f"{component}/{name_of(cls.__module__)}.py"] = _in_one_file(cls.__module__, sources).encode()
    index["_class_name"] = ["pipeline", DDPMCustomPipeline.__name__]
    return files | {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _in_one_file(module: str, sources: dict[str, str]) -> str:
    """The source code of a module, in which the modules of this package that it imports replace the imports."""
    lines = sources[module].splitlines()
    for node in reversed(ast.parse(sources[module]).body):
        if isinstance(node, ast.ImportFrom) and (node.module or "") in sources:
            lines[node.lineno - 1 : node.end_lineno] = _in_one_file(node.module, sources).splitlines()
    return "\n".join(lines) + "\n"


def _sources(module: str) -> dict[str, str]:
    """The source code, by name, of a module and of all modules of this package that it imports, also indirectly."""
    found, wanted = {}, [module]
    while wanted:
        module = wanted.pop()
        if module not in found:
            found[module] = inspect.getsource(importlib.import_module(module))
            imports = (node for node in ast.walk(ast.parse(found[module])) if isinstance(node, ast.ImportFrom))
            wanted += [node.module for node in imports if (node.module or "").startswith("ddpm_hf.")]
    return found
