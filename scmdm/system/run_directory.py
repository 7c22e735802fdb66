"""Layout of a run directory: the names of its files and folders."""

CONFIG_FILE = "config.yaml"  # the resolved configuration of the last start
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
STARTS_FILE = "starts.jsonl"
CHECKPOINTS = "checkpoints"
LATEST_FILE = "latest"  # in CHECKPOINTS: the name of the newest one
STACKS = "stacks"  # stack traces that the watchdog or a crash left
PROFILE = "profile"
LAUNCH = "launch"
LEASE = ".lease"
