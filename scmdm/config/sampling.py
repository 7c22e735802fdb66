"""Configuration of sampling: the sampler, `scmdm sample`, and the requests of `scmdm demo`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from scmdm.config.common import (
    batch_size_key,
    check_compile,
    compile_key,
    device_key,
    precision_key,
    resolve_weights_dtype,
    seed_key,
    shards_key,
    threads_key,
    verify_key,
    weights_dtype_key,
    weights_key,
)
from scmdm.config.fields import PathKind, key, require
from scmdm.diffusion.reveal_order import ORDERS, SamplerSettings
from scmdm.errors import UserError

SAMPLE_FORMATS = (".jsonl", ".txt", ".smi", ".fasta", ".fa", ".png", ".npy")
_DEMO_STEPS = 1024  # each step is a frame of the page
_ETA = 0.02  # default of remask_eta
_CACHE_CHECK = 64  # default of cache_check


@dataclass
class SamplerConfig:
    """The reverse process."""

    kind: str = key(
        "ancestral",
        help="how a step chooses the tokens to reveal; ancestral: each with the probability of the reverse process; "
        "first_hitting: one per evaluation, at the exact times; confidence, margin, entropy: the most certain first; "
        "random: the same number in random order",
        choices=("ancestral", "first_hitting", *ORDERS, "random"),
    )
    steps: int = key(
        32,
        help="denoiser evaluations; ignored by first_hitting, which needs one per token, and with threshold or factor",
        at_least=1,
        at_most=2**31,
    )
    eps: float = key(
        0.0, help="time at which the grid of steps ends; the last step reveals the rest", at_least=0, below=1
    )
    noise_removal: str = key(
        "last_step",
        help="ancestral: tokens that are masked at eps are drawn in the last step; or in one more evaluation, drawn or "
        "(greedy) the most probable ones, as in MDLM",
        choices=("last_step", "draw", "greedy"),
    )
    transfer: str = key(
        "schedule",
        help="tokens that a step reveals: as many as the noise schedule says; even: equally many, with a remainder in "
        "the first steps (LLaDA); ratio: the fraction 1 - s/t of the masked ones, rounded down (Dream)",
        choices=("schedule", "even", "ratio"),
    )
    threshold: float | None = key(
        None,
        help="reveal all tokens of at least this confidence, and at least one, in each step (Fast-dLLM)",
        at_least=0,
        at_most=1,
    )
    factor: float | None = key(
        None,
        help="reveal the n most confident tokens while (n + 1) (1 - confidence of the n-th) <= factor (Fast-dLLM)",
        above=0,
        at_most=1e6,
    )
    block_length: int | None = key(
        None,
        help="positions per block, decoded left to right, with steps shared by all blocks; null: one block",
        at_least=1,
        at_most=2**31,
    )
    block_start: str = key(
        "sequence",
        help="where blocks are counted from: the start of the sequence, or the end of the prompt",
        choices=("sequence", "prompt"),
    )
    cache: str = key(
        "auto",
        help="key-value cache; blocks: of finished blocks, exact, for a model with diffusion.block_length; prefix, "
        "dual: of the positions before the block, or of all outside it, approximate, for other models (Fast-dLLM); "
        "auto: blocks where possible, else none",
        choices=("auto", "none", "blocks", "prefix", "dual"),
    )
    cache_check: int = key(
        _CACHE_CHECK,
        help="prefix, dual: steps with the cache between two evaluations of whole sequences that measure the "
        "difference; 0: none",
        at_least=0,
        at_most=2**31,
    )
    tempered_order: bool = key(
        False,
        help="rank positions by the distribution that tokens are drawn from (temperature, top_k, top_p), as Dream does",
    )
    alg_temp: float = key(
        0.0,
        help="0: the most certain positions; above 0: positions drawn from softmax(confidence / alg_temp), as in Dream",
        at_least=0,
        at_most=1e6,
    )
    remask: str = key(
        "never",
        help="ancestral: mask revealed tokens again (ReMDM), with a capped or a rescaled probability",
        choices=("never", "cap", "rescale"),
    )
    remask_eta: float = key(
        _ETA,
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
    top_p_first: bool = key(False, help="restrict to top_p before top_k, as Dream does, instead of after")
    top_p_rule: str = key(
        "reaching",
        help="reaching: the nucleus contains the token that reaches top_p; within: it does not, unless that is the "
        "most probable one, as in MDLM's and ReMDM's code",
        choices=("reaching", "within"),
    )
    gumbel: str = key(
        "float64",
        help="precision of the Gumbel noise; float32 draws as MDLM's code: with ancestral, tokens and the mask in one "
        "race that also reveals less; with other kinds, tokens alone",
        choices=("float64", "float32"),
    )
    label: str | None = key(
        None, help="label to condition on, for a model with labels; each: all labels in turn; null: none"
    )
    guidance: float = key(
        1.0,
        help="classifier-free guidance; 1: none; above 1: closer to the condition, with two evaluations per step",
        at_least=0,
        at_most=1e6,
    )
    guided_by: str = key(
        "label",
        help="condition of the guidance; prompt: the other evaluation has the prompt masked (LLaDA's cfg_scale + 1)",
        choices=("label", "prompt"),
    )
    end_tokens: list[str] = key(
        factory=list, help="names of tokens that end a sample, besides [EOS], such as <|eot_id|> or <|im_end|>"
    )
    logits_eos_inf: bool = key(False, help="never draw [EOS] (LLaDA)")
    confidence_eos_eot_inf: bool = key(
        False, help="give [EOS] and end_tokens no confidence, so that they are revealed last (LLaDA)"
    )
    carry: str = key(
        "auto",
        help="condition each step on the estimate of the previous one; auto: if the model is self-conditioned",
        choices=("auto", "always", "never"),
    )
    idle_steps: str = key(
        "evaluate",
        help="steps that reveal nothing in a sequence; evaluate: refine its carried estimate, skip: keep the estimate "
        "of the last evaluation, which saves evaluations; without a carried estimate they are always skipped",
        choices=("evaluate", "skip"),
    )
    cuda_graphs: bool = key(False, help="replay evaluations as CUDA graphs: faster for small batches on a GPU")

    def of_model(self, block_length: int | None) -> SamplerConfig:
        """Return the configuration with what follows from a model, of blocks of `block_length` tokens or of none.

        Raises UserError for blocks or a cache that the model does not have.
        """
        cache = self.cache if self.cache != "auto" else "none" if block_length is None else "blocks"
        with_model = f"with a model of diffusion.block_length={block_length or 'null'}"
        approximate = self.cache in ("prefix", "dual")
        if block_length is None:
            require(cache != "blocks", "sampler.cache", cache, f"none, prefix or dual {with_model}")
            return replace(self, cache=cache)
        require(not approximate, "sampler.cache", self.cache, f"blocks or none {with_model}")
        same = self.block_length in (None, block_length)
        require(same, "sampler.block_length", self.block_length, f"null or {block_length} {with_model}")
        from_start = self.block_start == "sequence"
        require(from_start, "sampler.block_start", self.block_start, f"sequence {with_model}")
        own = replace(self, cache=cache, block_length=block_length)
        own.validate()
        return own

    def settings(
        self,
        self_conditioned: bool,
        end_ids: tuple[int, ...] = (),
        *,
        block_length: int | None = None,
        logit_shift: bool = False,
    ) -> SamplerSettings:
        """Return settings for `scmdm.diffusion.sampler.sample`.

        `end_ids` are the ids of [EOS] and of `end_tokens`, in this order; `block_length` and `logit_shift` are keys of
        the model. Raises UserError when an estimate should be carried, but the model is not self-conditioned, and as
        `of_model` does.
        """
        if self.carry == "always" and not self_conditioned:
            raise UserError(
                "sampler.carry=always, but the model is not self-conditioned; adapt it, or use sampler.carry=auto"
            )
        settings = {**asdict(self.of_model(block_length)), "carry": self_conditioned and self.carry != "never"}
        for name in ("label", "cuda_graphs", "end_tokens", "logits_eos_inf", "confidence_eos_eot_inf"):
            del settings[name]  # not of the reverse process
        never = end_ids[:1] if self.logits_eos_inf else ()
        late = end_ids if self.confidence_eos_eot_inf else ()
        return SamplerSettings(
            **settings,
            never_ids=never,
            late_ids=late,
            model_of_blocks=block_length is not None,
            logit_shift=logit_shift,
        )

    @property
    def adaptive(self) -> bool:
        """Whether confidence decides how many tokens a step reveals, and thereby the number of steps."""
        return self.threshold is not None or self.factor is not None

    @property
    def own_length(self) -> bool:
        """Whether the number of evaluations does not follow `steps`."""
        return self.kind == "first_hitting" or self.adaptive

    def check_length(self, length: int) -> None:
        """Raise UserError when `length` tokens, with the prompt or after it, have more blocks than there are steps."""
        blocks = 1 if self.block_length is None else -(-length // self.block_length)
        if self.kind != "first_hitting" and not self.adaptive and self.steps < blocks:
            raise UserError(
                f"sampler.steps={self.steps} is not possible with sampler.block_length={self.block_length}: a sequence "
                f"of {length} tokens has {blocks} blocks, and each needs a step"
            )

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        hits, ranked, with_kind = self.kind == "first_hitting", self.kind in ORDERS, f"with kind={self.kind}"
        approximate = self.cache in ("prefix", "dual")
        checks = f"{_CACHE_CHECK} without cache=prefix or cache=dual"
        has_condition = self.label is not None or self.guided_by == "prompt"
        leaves_noise = self.kind == "ancestral" and self.eps > 0 and self.block_length is None
        needs_noise = "last_step without kind=ancestral, an eps above 0 and block_length=null"
        needs_blocks = "auto, none or blocks without sampler.block_length, which prefix and dual need"
        needs_threshold = "null without kind=confidence or kind=margin"
        for name, possible, wanted in (
            ("eps", self.eps == 0 or not (hits or self.adaptive), "0 without a fixed number of steps"),
            ("noise_removal", self.noise_removal == "last_step" or leaves_noise, needs_noise),
            ("transfer", self.transfer == "schedule" or ranked or self.kind == "random", f"schedule {with_kind}"),
            ("threshold", self.threshold is None or self.kind in ("confidence", "margin"), needs_threshold),
            ("factor", self.factor is None or self.kind == "confidence", "null without kind=confidence"),
            ("factor", self.factor is None or self.threshold is None, "null with sampler.threshold"),
            ("transfer", self.transfer == "schedule" or not self.adaptive, "schedule with a threshold or a factor"),
            ("alg_temp", self.alg_temp == 0 or (ranked and not self.adaptive), "0 without a rank of a fixed length"),
            ("tempered_order", not self.tempered_order or ranked, f"false {with_kind}"),
            ("confidence_eos_eot_inf", not self.confidence_eos_eot_inf or ranked, f"false {with_kind}"),
            ("remask", self.remask == "never" or self.kind == "ancestral", f"never {with_kind}"),
            ("remask_eta", self.remask != "never" or self.remask_eta == _ETA, f"{_ETA} with remask=never"),
            (
                "remasked_estimate",
                self.remask != "never" or self.remasked_estimate == "token",
                "token with remask=never",
            ),
            ("top_p_rule", self.top_p_rule == "reaching" or self.top_p < 1, "reaching with top_p=1"),
            ("cache", not approximate or self.block_length is not None, needs_blocks),
            ("cache_check", approximate or self.cache_check == _CACHE_CHECK, checks),
            ("cuda_graphs", not self.cuda_graphs or self.cache in ("auto", "none"), f"false with cache={self.cache}"),
            ("guided_by", self.guided_by == "label" or self.guidance != 1, "label with guidance=1"),
            ("guidance", self.guidance == 1 or has_condition, "1 without sampler.label or sampler.guided_by=prompt"),
        ):
            require(possible, f"sampler.{name}", getattr(self, name), wanted)


@dataclass
class SampleConfig:
    """Keys of `scmdm sample`."""

    num: int = key(16, help="samples, or samples per prompt", at_least=1, at_most=2**24)
    length: int | None = key(None, help="tokens per sample; null: as in the training data", at_least=1, at_most=2**20)
    gen_length: int | None = key(
        None,
        help="tokens to generate after each prompt, whose samples have its length and these; null: up to length",
        at_least=1,
        at_most=2**19,
    )
    add_bos_token: bool = key(True, help="put [BOS] before a prompt or a text to fill in")
    batch_size: int | None = batch_size_key()
    seed: int = seed_key()
    prompt: str | None = key(None, free_text=True, help="text that every sample begins with")
    prompts: str | None = key(
        None, path=PathKind.INPUT, help='file with one prompt per line, or .jsonl with one {"prompt": TEXT} per line'
    )
    messages: str | None = key(
        None,
        path=PathKind.INPUT,
        help='.jsonl or parquet with one {"messages": CONVERSATION} per row that ends with a question, for the chat '
        "template",
    )
    chat: bool = key(
        False, help="put prompts into the tokenizer's chat template, as is always done for a model of conversations"
    )
    infill: str | None = key(None, free_text=True, help="text with [MASK] in place of each token to fill in")
    out: str | None = key(
        None,
        path=PathKind.OUTPUT,
        help=f"file to write, its format by its suffix ({', '.join(SAMPLE_FORMATS)}); null: print the texts",
    )
    weights: str = weights_key()
    verify: str = verify_key()
    device: str = device_key()
    precision: str = precision_key()
    weights_dtype: str = weights_dtype_key()
    shards: int = shards_key()
    compile: str = compile_key()
    threads: int = threads_key()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        """Raise UserError for a combination of keys that cannot work."""
        given = [name for name in ("prompt", "prompts", "messages", "infill") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both set; give one of them")
        if self.gen_length is not None:
            require(self.length is None, "length", self.length, "null with gen_length")
            require(self.infill is None, "infill", self.infill, "null with gen_length")
        prompted = self.prompt is not None or self.prompts is not None or self.messages is not None
        require(prompted or not self.chat, "chat", self.chat, "false without prompt, prompts or messages")
        known = self.out is None or self.out.endswith(SAMPLE_FORMATS)
        require(known, "out", self.out, f"a name that ends in one of {', '.join(SAMPLE_FORMATS)}")
        resolve_weights_dtype(self.weights_dtype, self.precision)
        check_compile(self.compile, self.shards)
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
