"""``export``: a finished run in a form for other programs."""

USAGE = """\
The trained weights of a finished run for other programs.

  diffora export <run>                       a LoRA adapter that PEFT, vLLM, TensorRT-LLM and llama.cpp read alike
  diffora export <run> form=compact          the same with each module's own rank, for PEFT and diffora only
  diffora export <run> form=merged           a whole model for from_pretrained, with its tokenizer
  diffora export <run> form=gguf             for llama.cpp, by its own converter (converter=<script>)

Also: to=<folder>; model.path=<folder> if the base model was moved; model.dtype=, model.quantise=null for form=merged;
task._target_= and method._target_= for classes of your own, which are also found in --config-dir <folder>. Without to=,
the files go to export-<form>/ in the run."""


def main(arguments: list[str]) -> None:
    """Export as the arguments ask, and say where the files are; without any, print the usage."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    from diffora.run.export import export, read_request

    request = read_request(arguments)
    lines = export(request)
    print("\n".join([f"{request.to}", *(f"  {line}" for line in lines)]))
