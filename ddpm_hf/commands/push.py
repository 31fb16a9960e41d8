"""Upload a pipeline folder to the Hugging Face Hub, with its model card."""


def add_arguments(parser) -> None:
    parser.add_argument("folder", help="a pipeline folder, such as training leaves")
    parser.add_argument("repo_id", help="user/model")
    repository = parser.add_argument_group("repository")
    repository.add_argument("--private", action="store_true", help="make the repository private")
    repository.add_argument("--revision", help="the branch, created if it does not exist; without it: main")
    repository.add_argument("--create_pr", action="store_true", help="open a pull request")
    contents = parser.add_argument_group("contents")
    contents.add_argument("--license", help="of the model, for its card, such as apache-2.0")
    contents.add_argument("--self_contained", action="store_true", help="add the code, for use without ddpm_hf")
    contents.add_argument("--space", action="store_true", help="create a Space too, with the page of `ddpm-hf demo`")


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
            raise ValueError(f"the model is at {address}, but of its Space {error}") from error
    print(address, flush=True)
