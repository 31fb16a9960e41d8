"""Convert a checkpoint of a tutorial or diffusers to a pipeline folder, or a pipeline folder to diffusers' format."""


def add_arguments(parser) -> None:
    from ddpm_hf.convert.convert import KINDS

    parser.add_argument("source", help="a file of weights, or a folder")
    parser.add_argument("output", help="the folder to write; it must not exist")
    to_ours = parser.add_argument_group("to a pipeline folder")
    to_ours.add_argument(
        "--from", dest="kind", metavar="|".join(KINDS), help="format of the source (default: detected from the weights)"
    )
    to_ours.add_argument(
        "--source_config",
        metavar="FILE",
        help="YAML or JSON with settings of the source that its weights do not determine",
    )
    to_theirs = parser.add_argument_group("to other formats")
    to_theirs.add_argument("--to", metavar="diffusers", help="write a pipeline that loads with diffusers alone")


def run(args) -> None:
    from ddpm_hf.convert.convert import convert, convert_back

    if args.to is None:
        lines = convert(args.source, args.output, args.kind, args.source_config)
    elif args.to != "diffusers":
        raise ValueError(f"to={args.to!r}; the only choice is diffusers")
    elif args.kind or args.source_config:
        raise ValueError("--to converts a pipeline folder, so --from and --source_config do not apply: leave them out")
    else:
        lines = convert_back(args.source, args.output)
    print("\n".join(lines))
