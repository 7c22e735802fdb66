"""Configuration of sampling: the sampler, `scmdm sample`, and the requests of `scmdm demo`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from scmdm.config.common import batch_size_key, device_key, precision_key, seed_key, threads_key, weights_key
from scmdm.config.fields import PathKind, key, require
from scmdm.diffusion.reveal_order import ORDERS, SamplerSettings
from scmdm.errors import UserError

SAMPLE_FORMATS = (".jsonl", ".txt", ".smi", ".fasta", ".fa", ".png", ".npy")
_DEMO_STEPS = 1024  # each step is a frame of the page


@dataclass
class SamplerConfig:
    """The reverse process."""

    kind: str = key(
        "ancestral",
        help="order in which tokens are revealed; confidence, margin and entropy: most certain first",
        choices=("ancestral", "first_hitting", *ORDERS),
    )
    steps: int = key(
        32, help="denoiser evaluations; ignored by first_hitting, which needs one per token", at_least=1, at_most=2**31
    )
    block_length: int | None = key(
        None,
        help="positions per block, decoded left to right, with steps shared by all blocks; null: one block",
        at_least=1,
        at_most=2**31,
    )
    remask: str = key(
        "never",
        help="ancestral: mask revealed tokens again (ReMDM), with a capped or a rescaled probability",
        choices=("never", "cap", "rescale"),
    )
    remask_eta: float = key(
        0.02,
        help="cap: largest remasking probability; rescale: fraction of the largest possible one",
        at_least=0,
        at_most=1,
    )
    remasked_estimate: str = key(
        "token",
        help="carried estimate at a remasked position: its former token, or none",
        choices=("token", "null"),
    )
    temperature: float = key(1.0, help="divides the logits; 0: the most probable token", at_least=0, at_most=1e6)
    top_k: int | None = key(
        None, help="draw from this number of most probable tokens; null: all", at_least=1, at_most=2**31
    )
    top_p: float = key(
        1.0, help="draw from the smallest set of tokens with at least this probability", above=0, at_most=1
    )
    gumbel: str = key(
        "float64",
        help="precision of the Gumbel noise; float32 reproduces the truncated tail of earlier code",
        choices=("float64", "float32"),
    )
    label: str | None = key(
        None, help="label to condition on, for a model with labels; each: all labels in turn; null: none"
    )
    guidance: float = key(
        1.0,
        help="classifier-free guidance; 1: none; above 1: closer to the label, with two evaluations per step",
        at_least=0,
        at_most=1e6,
    )
    carry: str = key(
        "auto",
        help="condition each step on the estimate of the previous one; auto: if the model is self-conditioned",
        choices=("auto", "always", "never"),
    )
    cuda_graphs: bool = key(False, help="replay evaluations as CUDA graphs: faster for small batches on a GPU")

    def settings(self, self_conditioned: bool) -> SamplerSettings:
        """Return settings for `scmdm.diffusion.sampler.sample`.

        Raises UserError when an estimate should be carried, but the model is not self-conditioned.
        """
        if self.carry == "always" and not self_conditioned:
            raise UserError(
                "sampler.carry=always, but the model is not self-conditioned; adapt it, or use sampler.carry=auto"
            )
        settings = {**asdict(self), "carry": self_conditioned and self.carry != "never"}
        for name in ("label", "cuda_graphs"):  # arguments of the sampling call, not of the reverse process
            del settings[name]
        return SamplerSettings(**settings)

    def check_length(self, length: int) -> None:
        """Raise UserError when a sequence of `length` tokens has more blocks than there are steps."""
        blocks = -(-length // (self.block_length or length))
        if self.kind != "first_hitting" and self.steps < blocks:
            raise UserError(
                f"sampler.steps={self.steps} is not possible with sampler.block_length={self.block_length}: a sequence "
                f"of {length} tokens has {blocks} blocks, and each needs a step"
            )

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        for name, possible, wanted in (
            ("block_length", self.block_length is None or self.kind != "first_hitting", "null with kind=first_hitting"),
            ("remask", self.remask == "never" or self.kind == "ancestral", f"never with kind={self.kind}"),
            ("guidance", self.guidance == 1 or self.label is not None, "1 without sampler.label"),
        ):
            require(possible, f"sampler.{name}", getattr(self, name), wanted)


@dataclass
class SampleConfig:
    """Keys of `scmdm sample`."""

    num: int = key(16, help="samples, or samples per prompt", at_least=1, at_most=2**24)
    length: int | None = key(None, help="tokens per sample; null: as in the training data", at_least=1, at_most=2**20)
    batch_size: int | None = batch_size_key()
    seed: int = seed_key()
    prompt: str | None = key(None, free_text=True, help="text that every sample begins with")
    prompts: str | None = key(
        None, path=PathKind.INPUT, help='file with one prompt per line, or .jsonl with one {"prompt": TEXT} per line'
    )
    infill: str | None = key(None, free_text=True, help="text with [MASK] in place of each token to fill in")
    out: str | None = key(
        None,
        path=PathKind.OUTPUT,
        help=f"file to write, its format by its suffix ({', '.join(SAMPLE_FORMATS)}); null: print the texts",
    )
    weights: str = weights_key()
    device: str = device_key()
    precision: str = precision_key()
    threads: int = threads_key()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        given = [name for name in ("prompt", "prompts", "infill") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both set; give one of them")
        known = self.out is None or self.out.endswith(SAMPLE_FORMATS)
        require(known, "out", self.out, f"a name that ends in one of {', '.join(SAMPLE_FORMATS)}")
        self.sampler.validate()


@dataclass
class DenoiseConfig:
    """A request of the demo's page: one sample, step by step."""

    seed: int = seed_key()
    prompt: str | None = key(None, free_text=True, help="text that the sample begins with")
    infill: str | None = key(None, free_text=True, help="text with [MASK] in place of each token to fill in")
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        if self.prompt is not None and self.infill is not None:
            raise UserError("prompt and infill are both set; give one of them")
        self.sampler.validate()
        steps = self.sampler.steps
        require(steps <= _DEMO_STEPS, "sampler.steps", steps, f"at most {_DEMO_STEPS} in the demo")
