"""The command line: a table of commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scmdm.config.arguments import Command, argument, make_parser, run_command
from scmdm.config.fields import PathKind
from scmdm.config.launch import LocalRanks, Ranks, SlurmJob
from scmdm.config.planning import PhaseSettings
from scmdm.errors import UserError
from scmdm.system.extras import extra_of_module
from scmdm.system.memory import is_out_of_memory
from scmdm.system.terminal import accept_any_text, discard_output, printable
from scmdm.system.untrusted import describe

_DESCRIPTION = "Masked diffusion models and their self-conditioning adaptation (SCMDM, arXiv 2604.26985)."
_EPILOG = """\
A run is one YAML file and key=value overrides:

  scmdm prepare configs/data/qm9.yaml                     QM9 -> tokenized shards in data/qm9
  scmdm train   configs/qm9/base.yaml                     pretrain a vanilla masked diffusion model
  scmdm adapt   configs/qm9/adapt.yaml base=runs/qm9-base run_dir=runs/qm9-scmdm
  scmdm sample  runs/qm9-scmdm num=8 sampler.steps=32
  scmdm demo    runs/qm9-scmdm                            watch it denoise, beside its base, in a browser
  scmdm evaluate runs/qm9-scmdm sampler.steps=32 metrics.fcd=true
  scmdm status  runs/qm9-scmdm                            progress, speed, last checkpoint, current job
  scmdm report  runs/qm9-scmdm                            curves, samples and numbers in one HTML file
  scmdm study   configs/qm9/quickstart.yaml               base against two adaptations, with a report
  scmdm import  mdlm-owt models/mdlm-owt tokenizer=gpt2   convert a published model (MDLM, LLaDA, Dream ...)
  scmdm export  runs/qm9-scmdm exported format=mdlm       convert a run to MDLM's layout, with a model card
  scmdm configs                                           list the configurations that come with scmdm
  scmdm plan    configs/scale/8b.yaml --nodes 8 --length 4096 --vocab 126464  memory and time on a cluster

`scmdm COMMAND --help` lists every key with its default. An interrupted run resumes when the same command is given
again. Mistakes end with one line on standard error and exit status 1.
"""

_CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended

_CONFIG = argument("config", "YAML file, such as configs/qm9/base.yaml", Path)
_CONFIG_OPTION = argument("--config", "YAML file with the keys below", Path, None)
_MODEL = argument("model", "run directory, checkpoint or exported model", Path)
_OUT = argument("out", "directory to create", Path, path=PathKind.OUTPUT)
_RUN = argument("directory", "run directory", Path)
_JSON = argument("--json", "print JSON", bool)
_LAUNCHED = argument("launched", "command: train, adapt, sample, evaluate, study, export or, on SLURM, prepare")
_SUBJECT = argument("subject", "its first argument: a YAML file, or the model of sample, evaluate and export", Path)
_LAUNCH_CONFIG = argument("--config", "sample, evaluate, export: YAML file with keys", Path, None)
_DRY_RUN = argument("--dry-run", "print what would be started, and write nothing", bool)

COMMANDS = (
    Command(
        "prepare",
        "Convert a corpus into hashed shards of tokens with a manifest, or check a prepared data set.",
        "data.preparation.prepare_command:prepare_or_verify",
        (argument("config", "YAML file, such as configs/data/qm9.yaml", Path, None),),
        "config.preparation:PrepareConfig",
        (argument("--verify", "check a prepared data set against its manifest", Path, None),),
    ),
    Command(
        "train",
        "Pretrain a masked diffusion model; an interrupted run resumes.",
        "training.train_command:train",
        (_CONFIG,),
        "config.run:RunConfig",
    ),
    Command(
        "adapt",
        "Post-train a model with self-conditioning, from base=RUN|CHECKPOINT|EXPORT; an interrupted run resumes.",
        "training.train_command:adapt",
        (_CONFIG,),
        "config.run:RunConfig",
    ),
    Command(
        "plan",
        "Predict memory, communication and time of a run on a cluster, and search for the best settings. Needs no GPU.",
        "planner.plan_command:plan",
        (argument("config", "YAML file of a run, or of a model, such as configs/model/8b.yaml", Path),),
        "planner.plan:PlanConfig",
        (
            argument("--nodes", "number of machines", int, 1, at_least=1, at_most=65536),
            argument("--gpus-per-node", "GPUs per machine", int, 8, at_least=1, at_most=1024),
            argument("--gpu", "GPU model: h100, h200, a100, b200 or l40s", str, "h100"),
            argument(
                "--length",
                "tokens per sequence (default: the data set's)",
                int,
                None,
                at_least=1,
                at_most=2**20,
            ),
            argument(
                "--vocab",
                "vocabulary size, mask included (default: the data set's)",
                int,
                None,
                at_least=2,
                at_most=2**24,
            ),
            argument(
                "--efficiency",
                "achieved fraction of peak FLOP/s in matrix products (default: measured values)",
                float,
                None,
                above=0,
                at_most=1,
            ),
            _JSON,
        ),
        option_groups={"phases": PhaseSettings},
    ),
    Command(
        "sample",
        "Draw samples from a model, optionally with a prompt or an infill template.",
        "sampling.sample_command:sample_and_print",
        (_MODEL,),
        "config.sampling:SampleConfig",
        (_CONFIG_OPTION,),
    ),
    Command(
        "evaluate",
        "Measure a model's NELBO and the quality of its samples.",
        "evaluation.evaluate:evaluate_and_print",
        (_MODEL,),
        "config.evaluation:EvaluateConfig",
        (_CONFIG_OPTION,),
    ),
    Command(
        "moses",
        "Compute the MOSES metrics of a file of molecules, or of MOSES's own training or test set.",
        "domains.molecules.moses_table:run_moses",
        (
            argument(
                "source",
                "SMILES per line (.smi, .csv), .jsonl of samples, or train, test, test_scaffolds",
                path=PathKind.INPUT,
            ),
        ),
        "domains.molecules.config:MosesConfig",
    ),
    Command(
        "demo",
        "Serve a local web page on which a model denoises beside its base, step by step.",
        "integrations.demo.server:run_demo",
        (_MODEL,),
        options=(
            argument("--base", "model to show beside it (default: the one it was adapted from)", Path, None),
            argument("--port", "local port; 0 chooses a free one", int, 7860, at_least=0, at_most=65535),
        ),
    ),
    Command(
        "import",
        "Convert a published model: MDLM, Duo, LLaDA, Dream, SDAR, LLaDA2, LLaMA, Qwen and others.",
        "convert.convert_command:run_import",
        (argument("source", "directory of safetensors, one such file, or a Lightning checkpoint", Path), _OUT),
        "config.conversion:ImportConfig",
    ),
    Command(
        "export",
        "Write a model into a new directory, in scmdm's layout or in one that other programs read.",
        "convert.convert_command:run_export",
        (_MODEL, _OUT),
        "config.conversion:ExportConfig",
        (_CONFIG_OPTION,),
    ),
    Command(
        "report",
        "Write a self-contained HTML report of a run or a study.",
        "evaluation.report_command:write_report",
        (argument("directory", "run or study directory", Path),),
        options=(
            argument("--out", "HTML file (default: report.html in the directory)", Path, None, path=PathKind.OUTPUT),
        ),
    ),
    Command(
        "status",
        "Show a run's progress, speed, checkpoints and restarts, and which job runs it.",
        "runtime.status_command:print_status",
        (_RUN,),
        options=(argument("--quick", "check the sizes of checkpoint files, not their hashes", bool), _JSON),
    ),
    Command(
        "study",
        "Adapt one base in several arms, sample, compare and report.",
        "study.run_study:run_study",
        (argument("config", "YAML file, such as configs/qm9/quickstart.yaml", Path),),
        "config.study:StudyConfig",
    ),
    Command(
        "doctor",
        "Show what this machine can run: GPUs, attention kernels, packages, disk space.",
        "doctor:print_findings",
        (argument("directory", "directory for runs, whose free space is checked", Path, Path()),),
    ),
    Command(
        "configs list",
        "List the configurations and base models that come with scmdm.",
        "config.shipped_command:list_shipped",
        is_default=True,
    ),
    Command(
        "configs copy",
        "Copy configurations and base models that come with scmdm, to edit them.",
        "config.shipped_command:copy_shipped",
        (argument("names", "names that `scmdm configs` lists, or folders of them (default: all)", repeatable=True),),
        options=(argument("--to", "directory in which configs/ is made", Path, Path(), path=PathKind.OUTPUT),),
    ),
    Command(
        "checkpoint list", "List a run's checkpoints and check them.", "checkpoint.checkpoint_command:list_all", (_RUN,)
    ),
    Command(
        "checkpoint verify",
        "Check every byte of a checkpoint or an export.",
        "checkpoint.checkpoint_command:verify",
        (argument("model", "checkpoint, exported model, or run directory (all its checkpoints)", Path),),
    ),
    Command(
        "launch slurm",
        "Submit a command as a SLURM job, from a frozen copy of code and configuration.",
        "launch.submit:launch_slurm",
        (_LAUNCHED, _SUBJECT),
        overrides=True,
        options=(
            _LAUNCH_CONFIG,
            _DRY_RUN,
            argument("--parsable", "print the id of the job and nothing else, for --after of the next one", bool),
            argument("--array", "prepare: number of array tasks", int, 1, at_least=1, at_most=65536),
        ),
        option_groups={"ranks": Ranks, "job": SlurmJob},
    ),
    Command(
        "launch local",
        "Start the ranks of a command on this machine through torchrun, from a frozen copy of code and configuration.",
        "launch.submit:launch_local",
        (_LAUNCHED, _SUBJECT),
        overrides=True,
        options=(
            _LAUNCH_CONFIG,
            _DRY_RUN,
            argument("--attempts", "maximum number of starts if ranks fail", int, 1, at_least=1, at_most=1000),
        ),
        option_groups={"ranks": LocalRanks},
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    return make_parser("scmdm", COMMANDS, _DESCRIPTION, _EPILOG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A bug ends in a traceback, everything else in one line."""
    accept_any_text()
    options = build_parser().parse_args(arguments)
    try:
        run_command(options)
        sys.stdout.flush()  # at exit Python could only report a full disk or a closed pipe
    except UserError as error:
        return _fail(str(error), error.status)
    except BrokenPipeError:
        discard_output()
        return _fail("the program that reads the output has ended", _CLOSED_PIPE)
    except OSError as error:  # a full or failing disk can raise one anywhere
        place = f" at {error.filename}" if error.filename else ""
        return _fail(f"I/O error{place}: {error.strerror or error}", 1)
    except ModuleNotFoundError as error:
        extra = extra_of_module(error.name or "")
        if extra is None:
            raise
        return _fail(f"the module {error.name} is not installed; install it with `pip install 'scmdm[{extra}]'`", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory: {describe(error)}; use smaller sizes, such as batch_size or length", 1)
    except KeyboardInterrupt:
        print("scmdm: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str, status: int) -> int:
    print(f"scmdm: error: {printable(message)}", file=sys.stderr)
    return status
