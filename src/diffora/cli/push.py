"""``push``: a finished run on the Hugging Face hub."""

USAGE = """\
A finished run on the Hugging Face hub: the adapter or the merged model, with a card and pictures.

  diffora push <run> owner/name                    the adapter, in the form that all programs read
  diffora push <run> owner/name private=true       only you and your organisation can see it
  diffora push <run> owner/name form=merged        a whole model; form=compact: each module's own rank

Log in first: `hf auth login`, or set HF_TOKEN. All files arrive in one commit, or none. No local paths are published.
Also: base=<hub id> if the base model was a local copy of it, and the settings of `diffora export`."""


def main(arguments: list[str]) -> None:
    """Publish as the arguments ask, and print the address; without any, print the usage."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    from diffora.run.push import push, read_request

    print(push(read_request(arguments)))
