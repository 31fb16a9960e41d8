"""Convert a tutorial's or diffusers' checkpoint to a pipeline folder, or a pipeline folder to diffusers' own format."""


def add_arguments(parser) -> None:
    from ddpm_hf.convert.convert import KINDS

    parser.add_argument("source", help="a file of weights, or a folder")
    parser.add_argument("output", help="the pipeline folder to write; it must not exist")
    to_ours = parser.add_argument_group("to a pipeline of ddpm_hf")
    to_ours.add_argument(
        "--from", dest="kind", metavar="|".join(KINDS), help="the source; without it, the weights determine it"
    )
    to_ours.add_argument(
        "--source_config",
        metavar="FILE",
        help="YAML or JSON in the source's own keys, for what weights do not determine",
    )
    to_theirs = parser.add_argument_group("to other formats")
    to_theirs.add_argument("--to", metavar="diffusers", help="write a folder that needs no package but diffusers")


def run(args) -> None:
    from ddpm_hf.convert.convert import convert, convert_back

    if args.to is None:
        lines = convert(args.source, args.output, args.kind, args.source_config)
    elif args.to != "diffusers":
        raise ValueError(f"to={args.to!r}; the only choice is diffusers")
    elif args.kind or args.source_config:
        raise ValueError("--to takes a pipeline folder of ours: give neither --from nor --source_config with it")
    else:
        lines = convert_back(args.source, args.output)
    print("\n".join(lines))
