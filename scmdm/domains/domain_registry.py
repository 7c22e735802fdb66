"""Registry of domains by name, and the choice of a data set's domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from scmdm.config.fields import require
from scmdm.config.loading import read_config
from scmdm.config.registry import Registry
from scmdm.data.manifest import Manifest
from scmdm.domains.interface import Domain, Metric, MetricKeys
from scmdm.errors import UserError

DOMAINS = Registry(
    "domain",
    "scmdm.domains",
    {
        "molecules": "scmdm.domains.molecules.domain:MoleculesDomain",
        "text": "scmdm.domains.text.domain:TextDomain",
        "responses": "scmdm.domains.responses.domain:ResponsesDomain",
        "genomes": "scmdm.domains.genomes.domain:GenomesDomain",
        "proteins": "scmdm.domains.proteins.domain:ProteinsDomain",
        "images": "scmdm.domains.images.domain:ImagesDomain",
        "codes": "scmdm.domains.codes.domain:CodesDomain",
    },
)
_BY_TOKENIZER = {
    "smiles": "molecules",
    "selfies": "molecules",
    "dna": "genomes",
    "amino_acids": "proteins",
    "levels": "images",
    "codes": "codes",
}


def domain_of_tokenizer(kind: str) -> str:
    """Name of the domain of a kind of tokenizer; `text` for a kind without its own domain."""
    return _BY_TOKENIZER.get(kind, "text")


def domain_of(manifest: Manifest) -> str:
    """Name of a data set's domain, which follows from its framing and tokenizer."""
    return "responses" if manifest.has_prompts else domain_of_tokenizer(manifest.tokenizer.kind)


def load_domain(name: str) -> type[Domain]:
    """Import a domain's class. Raises UserError for an unknown name."""
    domain: type[Domain] = DOMAINS.load(name)
    return domain


def main_metric(domain: type[Domain], name: str | None) -> Metric:
    """Return the metric `name` of a domain, or its first. Raises UserError if it has none of that name."""
    if name is None:
        return domain.metrics[0]
    own = {metric.name: metric for metric in domain.metrics}
    require(name in own, "metric", name, f"one of those of {domain.name}: {', '.join(own)}")
    return own[name]


def metrics_config(name: str, keys: Mapping[str, Any]) -> MetricKeys:
    """Validate the section `metrics` of a configuration against the keys of the domain `name`.

    Returns an instance of the domain's `Config`. Raises UserError for a key that the domain does not have, or a value
    that is not allowed.
    """
    schema: type[MetricKeys] = DOMAINS.schema(name)
    if keys and not dataclasses.fields(schema):
        raise UserError(f"metrics.{next(iter(keys))} is not a key: the domain {name} has none; leave it out")
    return read_config(schema, dict(keys), f"in metrics of the domain {name}")


def changed_keys(config: MetricKeys) -> dict[str, Any]:
    """Keys of a domain's `Config` whose value differs from the default."""
    defaults = dataclasses.asdict(type(config)())
    return {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
