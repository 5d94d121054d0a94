"""What is mutated: tiny models, an adapter, measured files and calibration data, made once."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import family, fine_tune, make_base, make_batches, save
from tests.words import WORDS, tokenizer_in

RANK, LORA_ALPHA = 2, 4


@dataclass(frozen=True)
class Material:
    """`folder` holds: llama/ and sharded/ (each base, expert-0, expert-1), vit/ (base, pictures/), adapter/ (of llama/base), texts/, measured/."""

    folder: Path

    def copy(self, case: Path, *parts: str) -> None:
        """Copies of parts, by their paths in `folder`, in a case's own."""
        for part in parts:
            source = self.folder / part
            (case / part).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, case / part)
            else:
                shutil.copyfile(source, case / part)


def make_material(folder: Path) -> Material:
    torch.set_num_threads(1)
    material = Material(folder)
    base, experts, _, _ = family("llama", folder / "llama")
    for name, model in zip(("base", "expert-0", "expert-1"), (base, *experts)):
        save(model, folder / "sharded" / name, max_shard_size="8KB")
        for layout in ("llama", "sharded"):
            tokenizer_in(folder / layout / name)
    _make_adapter(folder / "adapter")
    _make_texts(folder / "texts")
    _make_pictures(folder / "vit")
    _make_measured(material)
    _warm_up(folder)
    return material


def _make_adapter(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for module, out in (("q_proj", 16), ("v_proj", 8)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, 16, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def texts() -> list[str]:
    """Rows of words that the tokenizer knows, of unequal lengths."""
    return [" ".join(WORDS[(i * 5 + j * (i + 1)) % len(WORDS)] for j in range(2 + i % 5)) for i in range(8)]


def _make_texts(folder: Path) -> None:
    folder.mkdir()
    rows = texts()
    (folder / "rows.txt").write_text("".join(f"{row}\n" for row in rows))
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": row, "label": i}) + "\n" for i, row in enumerate(rows))
    )
    (folder / "rows.csv").write_text("text,label\n" + "".join(f'"{row}",{i}\n' for i, row in enumerate(rows)))
    (folder / "rows.tsv").write_text("label\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    batches = make_batches("llama", 3)
    inputs = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    save_file(inputs, folder / "rows.safetensors")


def _make_pictures(folder: Path) -> None:
    from PIL import Image

    model = make_base("vit")
    save(model, folder / "base")
    save(fine_tune(model, 1), folder / "expert-0")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    (folder / "expert-0" / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "pictures").mkdir()
    generator = torch.Generator().manual_seed(1)
    for number, suffix in enumerate(("png", "png", "jpg", "bmp")):
        pixels = torch.randint(0, 256, (20, 18, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{number}.{suffix}")


def _make_measured(material: Material) -> None:
    from bmm_engine.pipeline.measure import collect_from_checkpoint, fisher_from_checkpoint, sensitivity_from_checkpoint
    from bmm_engine.recipe.sections import CalibrationRecipe
    from bmm_engine.statistics.calibration import read_calibration

    options = CalibrationRecipe(fisher_labels="sampled")
    for index in range(2):
        model = str(material.folder / "llama" / f"expert-{index}")
        data = read_calibration(material.folder / "texts" / "rows.txt")
        for what, measure in (
            ("grams", collect_from_checkpoint),
            ("fisher", fisher_from_checkpoint),
            ("sensitivity", sensitivity_from_checkpoint),
        ):
            target = material.folder / "measured" / f"{what}-{index}.safetensors"
            measure(model, data, options, progress=False).save(target)


def _warm_up(folder: Path) -> None:
    """Import and run, once in the parent, what every child would else import for itself."""
    from typer.testing import CliRunner

    from bmm_engine.cli import app

    recipe = folder / "warm.yaml"
    recipe.write_text("base: llama/base\nexperts: [llama/expert-0, llama/expert-1]\n")
    grams = [str(folder / "llama" / "base"), str(folder / "texts" / "rows.txt"), "-o", str(folder / "warm.safetensors")]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        for argv in (
            ["merge", str(recipe), "-o", str(folder / "warm")],
            ["collect", *grams],
            ["inspect", str(folder / "llama" / "base")],
        ):
            result = CliRunner().invoke(app, argv, catch_exceptions=False)
            if result.exit_code:
                raise RuntimeError(f"bmm {argv}: {result.output}")
