"""The command `ddpm-hf`: runs the module of a subcommand, and prints expected errors in one line."""

import importlib
import os
import sys

from safetensors import SafetensorError

import ddpm_hf
from ddpm_hf.commands.parsing import Parser
from ddpm_hf.utils.arguments import shorten
from ddpm_hf.utils.memory import is_out_of_memory

# Name of a command and of its module here -> (help, the extra that it needs). A module is imported only to run its
# command, so that `ddpm-hf --help` and `ddpm-hf --version` import neither torch nor diffusers.
COMMANDS = {
    "train": ("train a model", "train"),
    "sample": ("generate images with a model, or compare solvers", None),
    "evaluate": ("evaluate a model, and write a report", "eval"),
    "push": ("upload a model to the Hub, with its model card", None),
    "convert": ("convert checkpoints of tutorials or diffusers, or convert to diffusers", "train"),
    "ema": ("make a model of another average of the weights, after training", "train"),
    "demo": ("serve a web page on which to try a model", "demo"),
    "plan": ("estimate the time and memory of a training run", "train"),
    "recipes": ("list the recipes for `ddpm-hf train --config`", "train"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 on success, 2 after an error that one line on stderr explains, 128 + the number of the signal
        after one that stopped it: 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(_command(argv[:1]), argv[1:])
    except KeyboardInterrupt as stopped:
        print(f"ddpm-hf: {str(stopped) or 'stopped by SIGINT'}", file=sys.stderr)
        return getattr(stopped, "status", 130)
    except Exception as error:
        if not _is_expected(error):
            raise
        # Of several processes, only the first prints an error that all of them raise.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "of_each_process", False):
            print(f"ddpm-hf: error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def _command(args: list[str]) -> str:
    parser = Parser(
        prog="ddpm-hf",
        description="Train, sample, evaluate and share denoising diffusion models that load in diffusers.",
        epilog="`ddpm-hf <command> --help` lists the flags of a command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"ddpm-hf {ddpm_hf.__version__}", help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="<command>", dest="command", required=True)
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


def _is_expected(error: BaseException) -> bool:
    """Whether the arguments, the files or the machine caused an error. Any other is a bug, and needs its traceback."""
    kinds = (ValueError, FloatingPointError, OSError, RecursionError, SafetensorError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error))


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        message = f"out of memory{': ' if message else ''}{message}"
    if isinstance(error, RecursionError):
        message = f"a file or argument is nested too deeply: {message}"
    return shorten(message, 480) or type(error).__name__
