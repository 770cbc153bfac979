"""The commands of ``glider-dist``: where each lives, and how it wants to be started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: the function that runs it (``module:function``), and what it does."""

    target: str
    doc: str
    takes_text: bool = False
    launches: bool = False
    keeps_record: bool = True  # writes a run directory
    serves: bool = False  # runs as a single process, without ranks and without a run directory
    own_usage: bool = False  # sorts its words and key=value itself, and explains them in the module's USAGE


_TRAINING = "glider_dist.training.experts"
_EVALUATION = "glider_dist.evaluation"

COMMANDS = {
    "quickstart": Command(
        "glider_dist.quickstart:run",
        "the whole method on a small model: train, route, evaluate, answer a query",
        takes_text=True,
        launches=True,
    ),
    "train-experts": Command(f"{_TRAINING}:train_experts", "train a LoRA expert for each held-in task"),
    "train-gates": Command(f"{_TRAINING}:train_gates", "train the local router's gate of each expert"),
    "describe": Command("glider_dist.semantics.describe:run", "write each expert's description into its card"),
    "index": Command(
        "glider_dist.semantics.indexing:run", "embed the descriptions into the global router's index"
    ),
    "calibrate": Command(
        f"{_EVALUATION}.calibrate:run", "choose alpha_in, alpha_out and threshold on validation queries"
    ),
    "train-joint": Command(
        "glider_dist.training.joint:run", "train experts and gates together, through the routers"
    ),
    "evaluate": Command(f"{_EVALUATION}.evaluate:run", "score the routers on test queries and print the table"),
    "bench": Command(
        "glider_dist.bench.command:run",
        "measure a layer, exchanges, training, checkpoints, the embedder or an evaluation: bench --help",
        own_usage=True,
    ),
    "average-activations": Command(
        f"{_EVALUATION}.activations:run",
        "mean inputs of each expert, for router.kind=average_activation",
        keeps_record=False,
    ),
    "predict": Command(
        f"{_EVALUATION}.predict:run",
        "answer a text and show which experts served it",
        takes_text=True,
        keeps_record=False,
    ),
    "serve-embeddings": Command(
        "glider_dist.semantics.service.server:run",
        "serve the embedder to all ranks, jobs and OpenAI clients over HTTP",
        serves=True,
    ),
    "plan": Command(
        "glider_dist.planning.command:run",
        "memory, batches, traffic and time of a configuration, without a GPU or weights",
    ),
    "fetch": Command(
        "glider_dist.fetch:run",
        "bring base, embedder and data sets into the caches, for machines without a network",
        keeps_record=False,
    ),
    "slurm": Command(
        "glider_dist.planning.slurm:run",
        "render or submit the pipeline as a chain of batch jobs",
        own_usage=True,
    ),
    "runs": Command(
        "glider_dist.tracking.runs:run", "list runs with state, progress and score; how to go on", own_usage=True
    ),
    "pool": Command(
        "glider_dist.pool_command:run",
        "import, ls, show, verify, remove, export, pack: adapters in and out of a pool",
        own_usage=True,
    ),
}
