from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hf_fedsa",
    version="0.1.0",
    description="Federated fine-tuning with FedSA-LoRA as a Hugging Face Trainer",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_fedsa", "hf_fedsa.*"]),
    package_data={"hf_fedsa": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.13",
        "transformers>=5.23,<6",
        "trl>=1.16,<2",
        "peft>=0.21,<0.22",
        "datasets>=5.2",
        "accelerate>=1.15",
        "huggingface_hub>=2.4",
        "safetensors>=0.8",
        "numpy",
    ],
    extras_require={
        "quantization": ["bitsandbytes>=0.50"],
        "demo": ["bitsandbytes>=0.50", "gguf>=0.19"],
        "benchmark": ["bitsandbytes>=0.50", "gguf>=0.19", "matplotlib>=3.11"],
        "dev": [
            "bitsandbytes>=0.50",
            "gguf>=0.19",
            "matplotlib>=3.11",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "tensorboard>=2.21",
            "trackio>=0.43",
        ],
    },
)
