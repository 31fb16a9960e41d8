"""Upload a pipeline folder to the Hugging Face Hub, with its model card."""


def add_arguments(parser) -> None:
    parser.add_argument("folder", help="a pipeline folder, such as the output folder of a training run")
    parser.add_argument("repo_id", help="user/model, the repository on the Hub")
    repository = parser.add_argument_group("repository")
    repository.add_argument("--private", action="store_true", help="make the repository private")
    repository.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    repository.add_argument("--create_pr", action="store_true", help="open a pull request instead of a commit")
    contents = parser.add_argument_group("contents")
    contents.add_argument("--license", help="licence of the model for its card, such as apache-2.0")
    contents.add_argument("--self_contained", action="store_true", help="include the code, for use without ddpm_hf")
    contents.add_argument("--space", action="store_true", help="also create a Space with the page of `ddpm-hf demo`")


def run(args) -> None:
    from ddpm_hf.hub.push import push
    from ddpm_hf.hub.space import push_space

    settings = vars(args)
    space = settings.pop("space")
    address = push(**settings)
    if space:
        try:
            print(push_space(args.repo_id, args.private), flush=True)
        except ValueError as error:
            raise ValueError(f"the model was uploaded to {address}, but its Space was not: {error}") from error
    print(address, flush=True)
