"""The command line. Each command reads its configuration, calls one function and prints what came out."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from scmdm.convert.convert_command import export_schema, import_schema, run_export, run_import
from scmdm.errors import UserError
from scmdm.launch.submit import add_launch
from scmdm.system.signals import StopRequest

if TYPE_CHECKING:
    from scmdm.config.run import RunConfig
    from scmdm.config.sampler import SampleConfig

_EPILOG = """\
A run is one YAML file and key=value overrides:

  scmdm prepare configs/data/qm9.yaml                     QM9 -> tokenized shards in data/qm9
  scmdm train   configs/qm9/base.yaml                     pretrain a vanilla masked diffusion model
  scmdm adapt   configs/qm9/adapt.yaml base=runs/qm9-base run_dir=runs/qm9-scmdm
  scmdm sample  runs/qm9-scmdm num=8 sampler.steps=32
  scmdm demo    runs/qm9-scmdm                            watch it denoise, beside its base, in a browser
  scmdm evaluate runs/qm9-scmdm sampler.steps=32 fcd=true
  scmdm status  runs/qm9-scmdm                            progress, speed, last checkpoint, who runs it
  scmdm report  runs/qm9-scmdm                            curves, samples and numbers in one HTML file
  scmdm study   configs/qm9/quickstart.yaml               base against three adaptations, with a report
  scmdm import  mdlm-owt models/mdlm-owt tokenizer=gpt2   a published model (MDLM, LLaDA, Dream ...) from its files
  scmdm export  runs/qm9-scmdm exported format=mdlm       and back, with its conditioner and a model card
  scmdm plan    configs/model/8b.yaml --nodes 8 --length 1024 --vocab 50258   memory, traffic and time on a cluster

`scmdm COMMAND --help` lists every key with its default. A run that was interrupted goes on when the same command is
given again. Mistakes end with one line on standard error and exit status 1.
"""


class _Parser(argparse.ArgumentParser):
    """Ends its help with the keys of the command's configuration, which it imports only when help is asked for."""

    schema: Callable[[], type] | None = None

    def format_help(self) -> str:
        text = super().format_help()
        if self.schema is None:
            return text
        from scmdm.config.help_text import describe_keys

        return f"{text}\nkeys, in the YAML file or as key=value:\n{describe_keys(self.schema())}\n"


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"scmdm: error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:  # a disk that is full or gone, wherever it shows
        place = f" {error.filename}" if error.filename else ""
        print(f"scmdm: error: the system refused{place}: {error.strerror or error}; see to that", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("scmdm: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="scmdm",
        description="Masked diffusion models and their self-conditioning adaptation (SCMDM, arXiv 2604.26985).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_training(commands)
    _add_plan(commands)
    _add_model_commands(commands)
    _add_interchange(commands)
    _add_report(commands)
    _add_checkpoint(commands)
    add_launch(commands)
    return parser


def _add(
    commands: _Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    schema: Callable[[], type] | None = None,
) -> _Parser:
    parser = commands.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.schema = schema
    parser.set_defaults(run=run)
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, as in optimizer.lr=3e-4")


def _schema(module: str, name: str) -> Callable[[], type]:
    """A configuration that is imported when its keys or values are asked for: `scmdm --help` is to be quick."""
    return lambda: getattr(importlib.import_module(f"scmdm.{module}"), name)


_prepare_schema = _schema("config.preparation", "PrepareConfig")
_run_schema = _schema("config.run", "RunConfig")
_sample_schema = _schema("config.sampler", "SampleConfig")
_evaluate_schema = _schema("config.sampler", "EvaluateConfig")
_moses_schema = _schema("domains.molecules.moses_config", "MosesConfig")
_study_schema = _schema("config.study_config", "StudyConfig")


def _add_prepare(commands: _Commands) -> None:
    summary = "Turn a corpus into tokenized, hashed, sharded data with a manifest; or check such a directory."
    parser = _add(commands, "prepare", _prepare, summary, _prepare_schema)
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check a prepared data set against its manifest")
    parser.add_argument("config", type=Path, nargs="?", help="YAML file, such as configs/data/qm9.yaml")
    _overrides(parser)


def _prepare(options: argparse.Namespace) -> None:
    if options.verify is not None:
        _verify(options.verify)
        return
    if options.config is None:
        raise UserError("prepare needs a YAML file (see configs/data) or --verify DIR")
    from scmdm.config.loading import load_config
    from scmdm.data.preparation.prepare import prepare

    prepare(load_config(_prepare_schema(), options.config, options.overrides))


def _verify(root: Path) -> None:
    from scmdm.data.manifest import Manifest, remote_of, verify_dataset

    remote, manifest = remote_of(root), Manifest.read(root)
    problems = verify_dataset(root, hashes=True)
    for problem in problems:
        print(problem)
    if problems:
        fetched = f"remove the files, to fetch them from {remote} again"
        remedy = fetched if remote else "prepare it again with overwrite=true"
        raise UserError(f"{root} has {len(problems)} problem(s); {remedy}")
    counts = ", ".join(f"{name} {split.samples}" for name, split in manifest.splits.items())
    kind = f"what has been fetched of {remote}, " if remote else ""
    print(f"{kind}{root} is whole: {counts} sequences of {manifest.length} tokens")


def _add_training(commands: _Commands) -> None:
    for name, run, summary in (
        ("train", _train, "Pretrain a masked diffusion model (resumes by itself)."),
        (
            "adapt",
            _adapt,
            "Post-train a model with self-conditioning, from base=RUN|CHECKPOINT|EXPORT (resumes by itself).",
        ),
    ):
        parser = _add(commands, name, run, summary, _run_schema)
        parser.add_argument("config", type=Path, help="YAML file, such as configs/qm9/base.yaml")
        _overrides(parser)


def _train(options: argparse.Namespace) -> None:
    with StopRequest() as stop:  # before the imports, which take seconds
        from scmdm.config.loading import load_config
        from scmdm.training.trainer import run_training

        config: RunConfig = load_config(_run_schema(), options.config, options.overrides)
        config.check_command("train")
        run_training(config, None, stop)


def _adapt(options: argparse.Namespace) -> None:
    with StopRequest() as stop:
        from scmdm.checkpoint.reader import find_model
        from scmdm.config.loading import load_config
        from scmdm.models.model_files import open_model
        from scmdm.training.trainer import run_training

        config: RunConfig = load_config(_run_schema(), options.config, options.overrides)
        config.check_command("adapt")
        run_training(config, open_model(find_model(Path(str(config.base)))), stop)


def _add_plan(commands: _Commands) -> None:
    summary = "What a run would need on a cluster: memory, traffic, time, and the best settings. Needs no GPU."
    parser = _add(commands, "plan", _plan, summary, _run_schema)
    parser.add_argument("config", type=Path, help="YAML file of a run, or of a model, such as configs/model/8b.yaml")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (8)")
    parser.add_argument("--gpu", default="h100", help="h100 | h200 | a100 | b200 | l40s (h100)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: the data set's)")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary with the mask (default: the data set's)")
    parser.add_argument("--efficiency", type=float, help="achieved fraction of the peak of products (measured ones)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _overrides(parser)


def _plan(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from scmdm.config.loading import load_config
    from scmdm.planner.hardware import make_assumptions, make_cluster
    from scmdm.planner.plan import PlanConfig, make_plan
    from scmdm.planner.plan_report import as_json, print_plan

    cluster = make_cluster(options.gpu, options.nodes, options.gpus_per_node)
    assumed = make_assumptions(options.efficiency)
    config = load_config(PlanConfig, options.config, options.overrides)
    plan = make_plan(config, cluster, assumed, length=options.length, vocab=options.vocab)
    if options.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        print_plan(plan, Console())
    if plan.found.best is None:
        raise UserError(f"nothing fits: {plan.found.reason}")


def _add_model_commands(commands: _Commands) -> None:
    for name, run, summary, schema in (
        (
            "sample",
            _sample,
            "Draw samples from a model, with a prompt or an infill template if you like.",
            _sample_schema,
        ),
        ("evaluate", _evaluate, "NELBO and sample quality of a model (molecules or text).", _evaluate_schema),
    ):
        parser = _add(commands, name, run, summary, schema)
        parser.add_argument("model", help="run directory, checkpoint or exported model")
        parser.add_argument("--config", type=Path, help="YAML file with the keys below")
        _overrides(parser)

    summary = "MOSES' metrics of a file of molecules, or of MOSES' own training or test set."
    parser = _add(commands, "moses", _moses, summary, _moses_schema)
    parser.add_argument("source", help="SMILES a line (.smi, .csv), .jsonl of samples, or train, test, test_scaffolds")
    _overrides(parser)

    parser = _add(commands, "demo", _demo, "A local web page: a model denoises beside its base, step by step.")
    parser.add_argument("model", type=Path, help="run directory, checkpoint or exported model")
    parser.add_argument("--base", type=Path, help="what to show beside it (default: what it was adapted from)")
    parser.add_argument("--port", type=int, default=7860, help="of this machine alone; 0: a free one (7860)")


def _moses(options: argparse.Namespace) -> None:
    from scmdm.config.loading import load_config
    from scmdm.domains.molecules.moses_table import run_moses

    run_moses(options.source, load_config(_moses_schema(), None, options.overrides))


def _demo(options: argparse.Namespace) -> None:
    from scmdm.integrations.demo.server import run_demo

    run_demo(options.model, options.base, options.port)


def _sample(options: argparse.Namespace) -> None:
    from scmdm.config.loading import load_config
    from scmdm.sampling.generate import run_sampling

    config: SampleConfig = load_config(_sample_schema(), options.config, options.overrides)
    generated = run_sampling(options.model, config)
    if config.out is None:
        for text in generated.texts:
            print(text)
    place = f" -> {config.out}" if config.out else ""
    cost = f"{generated.evaluations} denoiser evaluations each, {generated.seconds:.1f} s"
    note = f"{len(generated.texts)} samples, {cost}{place}"
    print(note, file=sys.stderr)


def _evaluate(options: argparse.Namespace) -> None:
    from scmdm.config.loading import load_config
    from scmdm.evaluation.evaluate import run_evaluation

    run_evaluation(options.model, load_config(_evaluate_schema(), options.config, options.overrides))


def _add_interchange(commands: _Commands) -> None:
    summary = "Make a model of somebody's published one: MDLM (UDLM, Duo), LLaDA, Dream, LLaMA, Qwen2."
    parser = _add(commands, "import", run_import, summary, import_schema)
    parser.add_argument("source", type=Path, help="directory of safetensors, one such file, or a Lightning checkpoint")
    parser.add_argument("out", type=Path, help="directory to make")
    _overrides(parser)
    summary = "Write a model into a new directory, as our own or in a layout that other programs read."
    parser = _add(commands, "export", run_export, summary, export_schema)
    parser.add_argument("model", type=Path, help="run directory, checkpoint or exported model")
    parser.add_argument("out", type=Path, help="directory to make")
    _overrides(parser)


def _add_report(commands: _Commands) -> None:
    parser = _add(commands, "report", _report, "Write a self-contained HTML report of a run or a study.")
    parser.add_argument("directory", type=Path, help="run or study directory")
    parser.add_argument("--out", type=Path, help="HTML file (default: report.html in the directory)")
    parser = _add(commands, "status", _status, "How a run stands: progress, speed, checkpoint, restarts, who runs it.")
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument("--quick", action="store_true", help="check the checkpoint's sizes, not its hashes")
    parser.add_argument("--json", action="store_true", help="all of it, for a program")
    parser = _add(commands, "study", _study, "Adapt one base in several arms, sample, compare, report.", _study_schema)
    parser.add_argument("config", type=Path, help="YAML file, such as configs/qm9/quickstart.yaml")
    _overrides(parser)
    parser = _add(commands, "doctor", _doctor, "Say what this machine can run: GPUs, attention, packages, disk.")
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), help="where runs will go (for free disk)")


def _report(options: argparse.Namespace) -> None:
    from scmdm.evaluation.report import print_summary, run_report, study_report

    directory = options.directory
    out = options.out or directory / "report.html"
    if (directory / "study.json").exists():
        print_summary(study_report(directory, out))
    elif (directory / "metrics.jsonl").exists():
        run_report(directory, out)
    else:
        raise UserError(f"{directory} is neither a run (metrics.jsonl) nor a study (study.json); give one of those")
    print(f"wrote {out}")


def _status(options: argparse.Namespace) -> None:
    import dataclasses
    import json

    from scmdm.runtime.status import describe_status, read_status

    status = read_status(options.directory, hashes=not options.quick)
    print(json.dumps(dataclasses.asdict(status), indent=2) if options.json else "\n".join(describe_status(status)))


def _study(options: argparse.Namespace) -> None:
    from scmdm.config.loading import load_config
    from scmdm.study.run_study import run_study

    run_study(load_config(_study_schema(), options.config, options.overrides))


def _doctor(options: argparse.Namespace) -> None:
    from rich.console import Console

    from scmdm.doctor import examine

    findings = examine(options.directory)
    console = Console()
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        console.print(f"[{colours[finding.level]}]{finding.level:<8}[/] {finding.subject:<16}", end="")
        console.print(finding.text, markup=False, highlight=False)
    problems = [finding.subject for finding in findings if finding.level == "problem"]
    if problems:
        raise UserError(f"problems with {', '.join(problems)}: see above")


def _add_checkpoint(commands: _Commands) -> None:
    parser = commands.add_parser("checkpoint", help="List or verify checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = _add(actions, "list", _checkpoint_list, "List a run's checkpoints and whether they verify.")
    listing.add_argument("run_directory", type=Path)
    verify = _add(actions, "verify", _checkpoint_verify, "Check every byte of a checkpoint or an export.")
    verify.add_argument("model", type=Path, help="checkpoint, export, or run directory (all its checkpoints)")


def _checkpoint_list(options: argparse.Namespace) -> None:
    from scmdm.checkpoint.reader import list_checkpoints
    from scmdm.checkpoint.seal import verify_checkpoint

    found = list_checkpoints(options.run_directory / "checkpoints")
    if not found:
        raise UserError(f"{options.run_directory} has no checkpoints; give a run directory that has trained")
    for path in found:
        problems = verify_checkpoint(path)
        print(path.name, "ok" if not problems else "; ".join(problems))


def _checkpoint_verify(options: argparse.Namespace) -> None:
    from scmdm.checkpoint.reader import list_checkpoints
    from scmdm.checkpoint.seal import verify_checkpoint

    found = list_checkpoints(options.model / "checkpoints") or [options.model]
    problems = [problem for path in found for problem in verify_checkpoint(path)]
    if problems:
        raise UserError(f"{'; '.join(problems)}: restore the directory or use another checkpoint")
    for path in found:
        print(f"{path} is whole")
