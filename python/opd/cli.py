# SPDX-License-Identifier: Apache-2.0
"""The `opd` command. Heavy imports are inside the subcommands, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# what an argparse.Namespace of ours has beside the options
_NO_OPTIONS = {"overrides", "run", "behind"}
RECIPES = Path(__file__).parent / "recipes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        0; 1 when training went wrong, 2 for a bad configuration, 128 + the number of a signal.
    """
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    behind: list[str] | None = None
    if words[:1] in (["bench"], ["profile"]) and "--" in words:
        # what follows belongs to another program; argparse has its own ideas of `--`
        words, behind = words[: words.index("--")], words[words.index("--") + 1 :]
    options, left = parser.parse_known_args(words)
    if left and "overrides" not in options:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # nothing is tokenized in threads here, and a fork would otherwise warn about it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.behind = behind
        if left:
            known = [
                f"--{key.replace('_', '-')}" for key in vars(options) if key not in _NO_OPTIONS
            ]
            options.overrides = _overrides(words, options.overrides, left, known)
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted before the end of a step, nothing was saved by it", file=sys.stderr)
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(error, file=sys.stderr)
        return code


def _overrides(
    words: list[str], found: list[str], left: list[str], known: Sequence[str]
) -> list[str]:
    """Also what argparse leaves of them: the ones apart from the others, and `--key=value`.

    Raises:
        ConfigError: an option that is none.
    """
    from opd.schema import ConfigError, did_you_mean

    for word in left:
        key = word.lstrip("-")
        if "=" not in word or word not in (key, f"--{key}"):
            after = words[words.index(word) + 1 :][:1]
            value = after[0] if after and not after[0].startswith("-") else "value"
            meant = key if "=" in key else f"{key}={value}"
            hint = did_you_mean(word, known)
            hint = hint or f", did you mean {meant!r}?"
            raise ConfigError(f"unknown option {word!r}{hint}")
    # in the order of the command line, for the last one counts
    return [word for word in words if word in {*found, *left}]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opd", description="On-policy distillation of language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train", help="train a student", description=_train.__doc__, allow_abbrev=False
    )
    _add_config(command)
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "eval", help="evaluate a checkpoint", description=_eval.__doc__, allow_abbrev=False
    )
    _add_config(command)
    command.add_argument("--checkpoint", help="default: the newest in output_dir")
    command.add_argument("--output", help="also write the numbers to this JSON file")
    command.set_defaults(run=_eval)

    command = commands.add_parser(
        "check",
        help="look at a run before it trains",
        description=_check.__doc__,
        allow_abbrev=False,
    )
    _add_config(command)
    command.add_argument("--num-rows", type=int, default=64, help="rows to look at; default 64")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.set_defaults(run=_check)

    command = commands.add_parser("report", help="draw runs as one HTML file")
    command.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    command.add_argument("--output", help="default: report.html in the first run's directory")
    command.set_defaults(run=_report)

    _add_cache(commands)

    command = commands.add_parser("recipes", help="list the recipes that come with opd")
    command.set_defaults(run=_recipes)

    command = commands.add_parser("kernels", help="list the kernels that can run here, and why not")
    command.set_defaults(run=_kernels)

    command = commands.add_parser(
        "serve-teacher",
        help="serve a teacher's laws over HTTP",
        description=_serve_teacher.__doc__,
    )
    _add_serving(command)
    command.set_defaults(run=_serve_teacher)

    command = commands.add_parser(
        "bench",
        help="run the benchmarks of a source checkout, or draw their page",
        usage="opd bench [cpu|gpu] [--report] [-- options of the suite]",
        description=_bench.__doc__,
    )
    command.add_argument("suite", nargs="?", choices=["cpu", "gpu"])
    command.add_argument("--report", action="store_true", help="write docs/benchmarks.md")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "profile",
        help="run a command and show the time of each opd:: range",
        usage="opd profile [--output FILE] [--with nsys|torch] -- COMMAND ...",
        description=_profile.__doc__,
    )
    command.add_argument("--output", help="the report; default: profile.nsys-rep or profile.json")
    command.add_argument("--with", dest="profiler", choices=["nsys", "torch"])
    command.set_defaults(run=_profile)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help="a YAML file, or the name of a recipe")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example student.dtype=bfloat16"
    )


def _add_serving(command: argparse.ArgumentParser) -> None:
    # checked, and given their defaults, by ServeConfig
    options = command.add_argument
    options("--model", required=True, help="path or name of a Hugging Face model, or builtin:NAME")
    options("--host", help="address to listen on, default 127.0.0.1; any other needs a token")
    options("--port", help="default 8642; 0 takes a free one")
    options(
        "--dtype", help="float32, bfloat16 or float16; default: bfloat16 on a GPU, else float32"
    )
    options("--device", help="default: the GPU if there is one")
    options("--attn-implementation", help="as in transformers")
    options("--vocab-size", help="the laws are over the first so many tokens")
    options("--max-length", help="tokens of a sequence, default: what the model has")
    options("--max-batch-tokens", help="of a forward pass, padding included, default 16384")
    options("--max-queue", help="requests that wait or run, default 64; a further one gets 429")
    options("--max-request-tokens", help="of all sequences of a request, default 65536")
    options("--max-topk", help="default 4096")
    options("--merge-ms", help="how long a batch that is not full waits for more, default 5")
    options("--hidden-rank", help="also serve hidden states on so many directions of the head")
    options("--num-threads", help="of torch on the CPU")
    options("--shutdown-s", help="after a signal, requests get so long to finish, default 30")
    options("--ssl-certfile", help="serve https")
    options("--ssl-keyfile", help="serve https")
    options("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_cache(commands: argparse._SubParsersAction) -> None:
    cache = commands.add_parser(
        "cache", help="keep a teacher's laws on disk", description=_cache_build.__doc__
    )
    actions = cache.add_subparsers(required=True, metavar="ACTION")
    command = actions.add_parser(
        "build", help="score completions", description=_cache_build.__doc__, allow_abbrev=False
    )
    _add_config(command)
    command.add_argument("--store", help="the directory; default: teacher_store in output_dir")
    command.add_argument("--num-topk", type=int, help="likeliest tokens of a law; default 64")
    command.add_argument("--bits", type=int, help="of each log-prob; default 10")
    command.add_argument(
        "--num-draws", type=int, help="keep so many draws from the law instead, for teacher_samples"
    )
    command.add_argument(
        "--proposal-temperature", type=float, help="of the draws; default 1: from the law itself"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(run=_cache_build)
    command = actions.add_parser("info", help="say what a store holds")
    command.add_argument("path")
    command.set_defaults(run=_cache_info)
    command = actions.add_parser("verify", help="read all of a store and list what is damaged")
    command.add_argument("path")
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(run=_cache_verify)


def _cache_build(options: argparse.Namespace) -> int:
    """Score the data's completions, or the student's, with the teacher; run it again to go on."""
    from opd.config import load_config
    from opd.store.build import build

    config = load_config(options.config, options.overrides)
    path = options.store or Path(config.output_dir) / "teacher_store"
    built = build(config, path, **_cache_form(config, options), quiet=options.quiet)
    print(
        f"{built.num_new:,} completions of {built.num_tokens:,} tokens scored, {built.num_known:,} "
        f"known, {built.seconds:,.1f} s",
        file=sys.stderr,
    )
    print(built.path)
    return 0


def _cache_form(config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What to keep of a law: what the options say, else what the objective asks for.

    Raises:
        ConfigError: options of both forms.
    """
    from opd.objectives.teacher_samples import check_proposal
    from opd.schema import ConfigError
    from opd.store import DrawsForm

    topk = {"num_topk": options.num_topk, "bits": options.bits}
    draws = {
        "num_draws": options.num_draws,
        "proposal_temperature": options.proposal_temperature,
    }
    topk, draws = ({k: v for k, v in form.items() if v is not None} for form in (topk, draws))
    if topk and draws:
        raise ConfigError(
            "--num-draws: a store holds draws or the likeliest tokens, give --num-draws and "
            "--proposal-temperature, or --num-topk and --bits"
        )
    if options.proposal_temperature is not None:
        try:
            check_proposal(options.proposal_temperature)
        except ValueError as error:
            raise ConfigError(f"--proposal-temperature: {error}") from None
    objective = config.objective
    if topk or not (draws or objective.asks == "samples"):
        return topk
    if objective.asks == "samples":
        draws = {
            "num_draws": objective.num_draws,
            "proposal_temperature": objective.proposal_temperature,
            **draws,
        }
    return {"draws": DrawsForm(**draws, seed=config.seed)}


def _cache_info(options: argparse.Namespace) -> int:
    """What a store holds, as a table; only what finds the records is read."""
    from opd.store import verify

    found = verify(options.path, records=False)
    _print_table(["", ""], _cache_rows(found))
    return _cache_damage(found)


def _cache_verify(options: argparse.Namespace) -> int:
    """Read every record of a store; 1 if one is damaged."""
    from rich.console import Console

    from opd.store import verify

    console = Console(stderr=True, quiet=options.quiet)
    with console.status(f"reading {options.path}") as status:
        found = verify(
            options.path,
            progress=lambda done, count: status.update(f"read {done} of {count} shards"),
        )
    if not found.damage:
        print(f"{found.num_records:,} records in {found.num_shards:,} shards are whole")
    return _cache_damage(found)


def _cache_damage(found: Any) -> int:
    for sentence in found.damage:
        print(sentence)
    return 1 if found.damage else 0


def _cache_rows(found: Any) -> list[list[str]]:
    manifest, teacher = found.manifest, found.manifest.fingerprint
    per_token = found.num_bytes / found.num_tokens if found.num_tokens else 0.0
    return [
        ["teacher", teacher.model],
        ["temperature", f"{teacher.temperature:g}"],
        ["fingerprint", teacher.digest()],
        ["vocabulary", f"{manifest.vocab_size:,}"],
        ["of a law", manifest.form.in_words()],
        ["shards", f"{found.num_shards:,}"],
        ["records", f"{found.num_records:,}, {found.num_keys:,} different"],
        ["tokens", f"{found.num_tokens:,}"],
        ["bytes", f"{found.num_bytes:,}, {per_token:.0f} a token"],
        ["unfinished files", f"{found.unfinished:,}"],
    ]


def _train(options: argparse.Namespace) -> int:
    """Train as a configuration says; run it again to go on after a stop."""
    from opd.config import load_config
    from opd.train import Interrupted, train

    config = load_config(options.config, options.overrides)
    try:
        result = train(config, quiet=options.quiet)
    except Interrupted as stop:
        saved = f"saved {config.output_dir}/checkpoint-{stop.step}, run again to go on"
        print(
            f"stopped after step {stop.step}; {saved if stop.step else 'nothing to save yet'}",
            file=sys.stderr,
        )
        return 128 + stop.signum
    print(f"{result.checkpoint}")
    if "html" in config.report_to:
        print(f"{result.output_dir / 'report.html'}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    """Accuracy and KL of a checkpoint on held-out rows, as a table."""
    from rich.console import Console

    from opd.assembly import (
        check_completions,
        check_positions,
        close_teacher,
        load_run_tokenizer,
        load_student,
        load_student_bytes,
        load_teacher_side,
        prepare_process,
    )
    from opd.checkpoint import newest_checkpoint
    from opd.config import load_config
    from opd.evaluation import EvaluationConfig, evaluate, load_held_out
    from opd.model import resolve_model_path
    from opd.schema import ConfigError, did_you_mean

    config = load_config(options.config, options.overrides)
    output = _writable(options.output)
    path = newest_checkpoint(config.output_dir)
    if options.checkpoint:
        path = Path(resolve_model_path(options.checkpoint))
        if not path.is_dir():
            siblings = [str(other) for other in path.parent.glob("*") if other.is_dir()]
            hint = did_you_mean(path, siblings)
            raise ConfigError(f"--checkpoint: no such directory '{path}'{hint}")
    if path is None:
        raise ConfigError(f"--checkpoint: is required, there is none in '{config.output_dir}' yet")
    prepare_process(config)
    settings = config.evaluation or EvaluationConfig()
    with Console(stderr=True).status(f"evaluating {path}"):
        tokenizer = load_run_tokenizer(config)
        student = load_student(config, tokenizer, path)
        teacher, translator = load_teacher_side(config, tokenizer, student)
        held_out = load_held_out(settings, config.task, config.data, tokenizer)
        check_completions(config, student, held_out=held_out)
        check_positions(config, student, teacher, held_out=held_out, translator=translator)
        found = evaluate(
            student,
            teacher,
            tokenizer,
            held_out,
            settings,
            max_completion_length=config.rollouts.max_completion_length,
            student_bytes=load_student_bytes(config, tokenizer),
            translator=translator,
        )
        close_teacher(teacher)
    _print_table(["metric", "value"], [[k, f"{v:.4f}"] for k, v in sorted(found.metrics.items())])
    if output is not None:
        output.write_text(json.dumps(found.metrics, indent=2), encoding="utf-8")
    return 0


def _check(options: argparse.Namespace) -> int:
    """Tokenizers, special tokens, prompts, alignment and a probe of zero; 1 if something would
    train wrongly."""
    from rich.console import Console
    from rich.progress import Progress

    from opd.check import STAGES, check
    from opd.config import load_config
    from opd.schema import ConfigError

    if options.num_rows < 1:
        raise ConfigError(f"--num-rows: must be >= 1, got {options.num_rows}")
    config = load_config(options.config, options.overrides)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(STAGES))
        found = check(
            config,
            num_rows=options.num_rows,
            on_stage=lambda stage: bar.update(task, description=stage, advance=1),
        )
    if options.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return 1 if found.wrong else 0
    for table in found.tables:
        _print_table([table.title, *table.header[1:]], table.rows)
    for sentence in found.doubts:
        print(f"look at: {sentence}")
    for sentence in found.wrong:
        print(f"wrong: {sentence}")
    if not found.wrong:
        print("nothing found that would train wrongly")
    return 1 if found.wrong else 0


def _report(options: argparse.Namespace) -> int:
    from opd.report import write_report

    print(write_report([Path(run) for run in options.run_dirs], _writable(options.output)))
    return 0


def _writable(output: str | None) -> Path | None:
    """The path of --output in a directory that exists, known before the work is done."""
    from opd.schema import ConfigError

    if output is None:
        return None
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"--output: '{path}' is a directory, a file is wanted")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot make '{path.parent}': {error}") from None
    return path


def _recipes(options: argparse.Namespace) -> int:
    rows = []
    for path in sorted(RECIPES.glob("*.yaml")):
        what, source, *_ = recipe_header(path)
        rows.append([path.stem, what, source])
    _print_table(["recipe", "what it does", "source"], rows)
    return 0


def recipe_header(path: Path) -> list[str]:
    """The comment at the top of a recipe: what it does, its source, what is worth knowing."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "SPDX" not in line:
            lines.append(line.removeprefix("#").strip())
    return lines


def _kernels(options: argparse.Namespace) -> int:
    import opd_kernels as opk

    rows = [
        [row["op"], row["backend"], "yes" if row["available"] else "no", row["reason"]]
        for row in opk.kernel_table()
    ]
    _print_table(["op", "backend", "available", "reason"], rows)
    return 0


def _serve_teacher(options: argparse.Namespace) -> int:
    """Serve hidden states, top-k and token log-probabilities until a signal; the token of clients
    is read from OPD_TEACHER_TOKEN."""
    from opd.schema import ConfigError

    try:
        from opd.server.serve import parse_options, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"opd serve-teacher needs the package {error.name!r}: pip install 'opd-kernels[server]'"
        ) from None
    skipped = ("run", "behind")
    values = {k: v for k, v in vars(options).items() if k not in skipped and v is not None}
    return serve(parse_options(values))


def _bench(options: argparse.Namespace) -> int:
    """Run a suite of benchmarks of a source checkout; --report draws the page of the results."""
    from opd.bench import bench

    return bench(options.suite, options.behind or [], report=options.report)


def _profile(options: argparse.Namespace) -> int:
    """Run a command under nsys where it is on PATH, else under torch's profiler."""
    from opd.profile import HEADER, choose, profile

    command = options.behind or []
    profiler = choose(options.profiler, command)
    outcome = profile(command, profiler, _writable(options.output))
    if outcome.rows:
        _print_table(HEADER, [row.cells() for row in outcome.rows])
    else:
        print("no opd:: range ran", file=sys.stderr)
    for line in outcome.notes:
        print(line, file=sys.stderr)
    if outcome.report is not None:
        print(outcome.report)
    return outcome.code


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    # a log has no width; wrapping there would only cut words
    (console if console.is_terminal else Console(width=200, markup=False)).print(table)


def _exit_code(error: Exception) -> int | None:
    """Of errors that say in one sentence what to change; any other is a defect of ours."""
    from opd.clients import TeacherError
    from opd.schema import ConfigError

    if isinstance(error, ConfigError):
        return 2
    return 1 if isinstance(error, FloatingPointError | TeacherError) else None
