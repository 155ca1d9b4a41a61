"""What a run reads: base, tokenizer, split rule and examples, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from pshare_jax.convert.manifest import TOKENIZER_FOLDER, Manifest, read_manifest
from pshare_jax.core.split_rule import LAST_TOKEN, SplitRule
from pshare_jax.errors import ConfigError, DataError
from pshare_jax.frontend.chat import TemplateOptions
from pshare_jax.frontend.model_format import tool_prompt
from pshare_jax.frontend.tool_calls import parser_named
from pshare_jax.text.openings import split_rule
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.train.answers import say_counts
from pshare_jax.train.config import TrainConfig
from pshare_jax.train.data import Dataset, LineReader, read_dataset
from pshare_jax.train.data_report import data_report
from pshare_jax.train.distributed import wait_for_all
from pshare_jax.train.endpoint import EndpointTeacher
from pshare_jax.train.fine_tune import FineTune
from pshare_jax.train.report import Reporter


@dataclass(frozen=True)
class Inputs:
    """See above.

    Args:
        base: the prefill checkpoint.
        tokenizer: its tokenizer.
        rule: the decode module's split rule; in mode `full` that of how it is served.
        teacher: whose distributions are learned, if any.
        start: what the weights start from, if it is not the base.
        train: the training set.
        held_out: the evaluation set, if any.
    """

    base: Manifest
    tokenizer: Tokenizer
    rule: SplitRule
    teacher: FineTune | None
    start: FineTune | None
    train: Dataset
    held_out: Dataset | None

    @property
    def positions(self) -> int:
        """Most tokens of an example that base and teacher have positions for."""
        return positions(self.base, self.teacher)


def positions(base: Manifest, teacher: FineTune | None) -> int:
    """Most tokens that `base` and `teacher` have positions for."""
    most = base.config.max_position_embeddings
    return most if teacher is None else min(most, teacher.config.max_position_embeddings)


def chat_options(config: TrainConfig, tokenizer: Tokenizer) -> TemplateOptions:
    """How the server that is to serve the module renders chats.

    Raises:
        ConfigError: `data.tool_parser` names no parser.
    """
    name = config.data.tool_parser
    if name not in ("auto", "none"):
        parser_named(name)
    return TemplateOptions(
        tool_prompt=tool_prompt(name, tokenizer.chat_template),
        special_tokens=config.data.special_tokens_in_text,
    )


def read_inputs(
    config: TrainConfig, reporter: Reporter, *, first: bool = True, ask: bool = True
) -> Inputs:
    """Reads all of it, and tells what the data is like.

    Args:
        config: the run's.
        reporter: tells the user.
        first: whether this process asks a teacher behind a URL; the others wait for it.
        ask: whether such a teacher is asked at all; else what lacks an answer stays a question.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: names the key, line, file or server.
    """
    base = read_manifest(config.base)
    if base.kind != "prefill":
        raise ConfigError(f"base: {config.base} is a decode module; name a prefill checkpoint")
    teacher = None
    if config.distill.teacher and not config.distill.is_url:
        teacher = FineTune(config.distill.teacher, base, "distill.teacher")
        teacher.check_teaches()
    start = None
    if config.init:
        start = FineTune(config.init, base, "init")
    elif config.distill.init == "teacher" and not config.lora.rank:
        start = teacher
    tokenizer = Tokenizer.load(base.folder / TOKENIZER_FOLDER)
    # An ordinary fine-tune prefills its prompts itself: any split is the same to it.
    rule = LAST_TOKEN if config.mode == "full" else split_rule(config.tail, lambda: tokenizer)
    server = None
    if config.distill.is_url and ask:
        server = EndpointTeacher(config.distill, config.folder, reporter)
        paths = [*config.data.train, *config.data.eval]
        if first:
            server.ask(paths)
        wait_for_all("answers")
        server.load()
    reader = LineReader(
        tokenizer,
        config.data.max_length,
        positions(base, teacher),
        rule,
        unanswered=config.mode == "distill" and server is None,
        turns=config.data.turns,
        options=chat_options(config, tokenizer),
        complete=None if server is None else server.complete,
    )
    try:
        train = read_dataset(config.data.train, reader, config.data.on_bad_line)
    except DataError:
        if server is not None:  # a reason that explains more than that there are no examples
            say_counts(server.total, empty=server.empty, cut=0, reporter=reporter)
        raise
    held_out = None
    if config.data.eval:
        held_out = read_dataset(config.data.eval, reader, config.data.on_bad_line)
    if server is not None:
        if not server.total:
            raise ConfigError(
                f"distill.teacher: {config.distill.teacher} has nothing to answer: every line has "
                "an answer already; leave the answers out, or train with mode=cache-conditioned"
            )
        say_counts(server.total, empty=server.empty, cut=server.cut, reporter=reporter)
    for name, dataset in (("data.train", train), ("data.eval", held_out)):
        if dataset is not None:
            other = train if name == "data.eval" else None
            for line in data_report(name, dataset, other):
                reporter.say(line)
    return Inputs(base, tokenizer, rule, teacher, start, train, held_out)
