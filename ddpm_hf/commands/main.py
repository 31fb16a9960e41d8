"""The command `ddpm-hf`. Thin: it finds the command's module, and says in one line what went wrong."""

import importlib
import os
import sys

from safetensors import SafetensorError

import ddpm_hf
from ddpm_hf.commands.parsing import Parser
from ddpm_hf.utils.memory import is_out_of_memory

# Name -> help, and the extra of the distribution that it needs. The names are those of the modules here, which are not
# imported before they are run: `--help` and `--version` need neither torch nor diffusers.
COMMANDS = {
    "train": ("train a model; `ddpm-hf train --help` lists the settings", "train"),
    "sample": ("generate images with a model, or compare solvers", None),
    "evaluate": ("measure how good a model is, and write a report", "eval"),
    "push": ("upload a model to the Hub, with its card", None),
    "convert": ("convert a tutorial's or diffusers' checkpoint to a pipeline, or back to diffusers", "train"),
    "demo": ("serve a page to try a model in the browser", "demo"),
    "plan": ("estimate what a training run will cost before it starts", "train"),
    "recipes": ("list the recipes of `ddpm-hf train --config`", "train"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status. 0: done; 2: something can't be done, with one line on stderr that says what; 143 and 130:
        stopped by SIGTERM and Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(_command(argv[:1]), argv[1:])
    except KeyboardInterrupt as stopped:
        print(f"ddpm-hf: {str(stopped) or 'stopped by SIGINT'}", file=sys.stderr)
        return getattr(stopped, "status", 130)
    except Exception as error:
        if not _is_explained(error):
            raise
        # Of several processes one speaks, unless the error is of each.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "of_each_process", False):
            print(f"ddpm-hf: error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def _command(args: list[str]) -> str:
    parser = Parser(prog="ddpm-hf", description=ddpm_hf.__doc__)
    parser.add_argument("--version", action="version", version=f"ddpm-hf {ddpm_hf.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help, _) in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    return parser.parse_args(args).command


def _run(name: str, args: list[str]) -> int:
    try:
        command = importlib.import_module(f"ddpm_hf.commands.{name}")
        parser = Parser(
            prog=f"ddpm-hf {name}",
            description=command.__doc__,
            old_flags=getattr(command, "OLD_FLAGS", {}),
            hints=getattr(command, "HINTS", {}),
        )
        command.add_arguments(parser)
        return command.run(parser.parse_args(args)) or 0
    except ImportError as error:
        if (error.name or "").startswith("ddpm_hf"):
            raise
        extra = COMMANDS[name][1]
        install = f"pip install ddpm-hf[{extra}]" if extra else "pip install ddpm-hf"
        raise ValueError(f"{error}: `ddpm-hf {name}` needs more packages, `{install}`") from error


def _is_explained(error: BaseException) -> bool:
    """Whether an error is of what was asked for or of the machine, and its message says so; else it is a fault of ours,
    and the traceback is wanted."""
    kinds = (ValueError, FloatingPointError, OSError, RecursionError, SafetensorError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error))


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        message = f"this machine's memory does not suffice{': ' if message else ''}{message}"
    if isinstance(error, RecursionError):
        message = f"something is nested too deeply: {message}"
    return message or type(error).__name__
